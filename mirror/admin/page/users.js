// The users of the server, and when each has last used it.

import { get } from "./api.js";
import { byId, el, fill } from "./dom.js";
import { ago, count, plural } from "./format.js";

const MAX_ROWS = 20;
const TITLES = ["User", "Last used", "Last push", "Requests"];

/** Read the users who came last. */
export async function refreshUsers() {
  const { users, total } = await get("/users", { limit: MAX_ROWS });
  byId("users").hidden = users.length === 0;
  if (!users.length) return;
  fill(
    byId("users"),
    el("h3", {}, "Users"),
    el("p", { class: "muted" },
      `${plural(total, "user")}, the latest first`
      + (total > users.length ? ` · ${count(total - users.length)} more: oci-mirror ls --users` : "")),
    el("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": "Users by last use" }, el(
      "table",
      { class: "small" },
      el("thead", {}, el("tr", {}, TITLES.map((text, index) =>
        el("th", { scope: "col", class: index === 3 ? "number" : "" }, text)))),
      el("tbody", {}, users.map((row) =>
        el(
          "tr",
          {},
          el("td", { class: "user" }, row.user),
          el("td", {}, ago(row.last_used)),
          el("td", {}, ago(row.last_push)),
          el("td", { class: "number" }, count(row.requests)),
        ))),
    )),
  );
}
