// The table of images, one image with its parts, and what can be done with it.

import { get, post } from "./api.js";
import { ask, attempt, openDialog, showChange, toast } from "./dialogs.js";
import { byId, chip, el, fill } from "./dom.js";
import { ago, bytes, moment, plural, shortDigest } from "./format.js";

const PAGE_ROWS = 20;
const STATE_KIND = { complete: "", partial: "warn", stale: "warn", hosted: "accent", pinned: "accent", frozen: "accent", leased: "accent", blocked: "bad" };
const COLUMNS = [
  ["name", "Image", ""],
  [null, "State", ""],
  ["size", "Size", "number"],
  ["unique", "Frees", "number"],
  ["last_used", "Used", "number"],
  ["confirmed", "Confirmed", "number"],
];

const view = { search: "", state: "", sort: "last_used", order: "desc", offset: 0 };
let isReadOnly = false;
let latest = 0;

/** Hide what a read-only token may not do. */
export function setReadOnly(value) {
  isReadOnly = value;
}

/** Read the page of images that is shown. */
export async function refreshImages() {
  const mine = ++latest;
  const answer = await get("/images", { ...view, limit: PAGE_ROWS });
  if (mine !== latest) return;
  if (view.offset && !answer.images.length) {
    view.offset = 0;
    await refreshImages();
    return;
  }
  const filtered = view.search || view.state ? ` of ${plural(answer.total, "image")}` : "";
  byId("images-count").textContent = filtered
    ? `${answer.matching}${filtered}`
    : plural(answer.total, "image");
  drawTable(answer);
  drawPages(answer);
}

function drawTable(answer) {
  if (!answer.images.length) {
    fill(byId("images-table"), el("p", { class: "empty" }, answer.total
      ? "No image matches."
      : "The cache is empty. Images appear here once a client has pulled them, or after Warm."));
    return;
  }
  const focused = document.activeElement?.dataset?.sort;
  const head = COLUMNS.map(([key, title, kind]) => {
    const order = view.order === "asc" ? "ascending" : "descending";
    return el("th", { scope: "col", class: kind, "aria-sort": key === view.sort ? order : null },
      key ? el("button", { type: "button", data: { sort: key }, on: { click: () => sortBy(key) } }, title) : title);
  });
  if (!isReadOnly) head.push(el("th", { scope: "col" }, el("span", { class: "unseen" }, "Actions")));
  fill(
    byId("images-table"),
    el("div", { class: "scroll" },
      el("table", { class: "rows" }, el("thead", {}, el("tr", {}, head)), el("tbody", {}, answer.images.map(row)))),
  );
  if (focused) document.querySelector(`[data-sort="${focused}"]`)?.focus();
}

function row(image) {
  const cell = (label, text, title) => el("td", { class: "number", title, data: { label } }, text);
  return el(
    "tr",
    { data: { image: image.name } },
    el("td", { class: "name" },
      el("button", { class: "link", type: "button", on: { click: () => showImage(image.name) } }, image.name),
      el("div", { class: "muted" }, [shortDigest(image.digest), platformText(image.platforms)].filter(Boolean).join(" · "))),
    el("td", { class: "wide" }, stateChips(image)),
    cell("Size", bytes(image.size)),
    cell("Frees", bytes(image.unique)),
    cell("Used", ago(image.last_used), moment(image.last_used)),
    cell("Confirmed", ago(image.confirmed), moment(image.confirmed)),
    !isReadOnly && el("td", { class: "wide" }, el("div", { class: "row-actions" }, actions(image))),
  );
}

function platformText(platforms) {
  const more = platforms.length - 3;
  return platforms.slice(0, 3).join(", ") + (more > 0 ? ` and ${more} more` : "");
}

function reasons(image) {
  return {
    partial: image.missing_parts ? `lacks ${plural(image.missing_parts, "part")}, at least ${bytes(image.missing_bytes)}` : "",
    absent: image.absent_why ?? "",
    stale: image.stale_why ?? "",
    blocked: image.blocked_why ?? "",
  };
}

function stateChips(image) {
  return image.state.map((state) => {
    const made = chip(state, STATE_KIND[state] ?? "");
    made.title = reasons(image)[state] ?? "";
    return made;
  });
}

function actions(image, kind = "quiet") {
  const button = (text, act, extra = "") =>
    el("button", { type: "button", class: `${kind} ${extra}`, "aria-label": `${text} ${image.name}`, on: { click: act } }, text);
  const isPinned = image.state.includes("pinned");
  const isBlocked = image.state.includes("blocked");
  return [
    button(isPinned ? "Unpin" : "Pin", () => attempt(() => post(isPinned ? "/unpin" : "/pin", { image: image.name }))),
    button(isBlocked ? "Unblock" : "Block", () => (isBlocked ? unblock(image) : block(image))),
    button("Warm", () => warm(image.name)),
    button("Remove", () => remove(image), "danger"),
  ];
}

function unblock(image) {
  return attempt(() => post("/unblock", { target: image.name }));
}

function block(image) {
  ask({
    title: "Block image",
    text: `Clients that ask for ${image.name} are refused from now on. They are told the reason.`,
    button: "Block",
    isDangerous: true,
    fields: [{ name: "reason", label: "Reason" }],
    act: async ({ reason }) => showChange(await post("/block", { target: image.name, reason })),
  });
}

function remove(image) {
  ask({
    title: "Remove image",
    text: `${image.name} is removed from the cache. This frees ${bytes(image.unique)}; parts that other images share stay.`,
    button: `Remove, free ${bytes(image.unique)}`,
    isDangerous: true,
    act: async () => {
      await post("/jobs/remove", { images: [image.name] });
      toast(`removing ${image.name}`);
    },
  });
}

/** Fetch an image ahead. */
export async function warm(name) {
  const job = await attempt(() => post("/jobs/warm", { images: [name] }));
  if (job) toast(`warming ${name}`);
  return job !== null;
}

function sortBy(key) {
  if (view.sort === key) {
    view.order = view.order === "asc" ? "desc" : "asc";
  } else {
    view.sort = key;
    view.order = key === "name" ? "asc" : "desc";
  }
  view.offset = 0;
  refreshImages().catch((error) => toast(error.message, true));
}

function drawPages(answer) {
  const from = answer.matching ? view.offset + 1 : 0;
  const until = view.offset + answer.images.length;
  const turn = (offset) => () => {
    view.offset = offset;
    refreshImages().catch((error) => toast(error.message, true));
  };
  fill(
    byId("images-pages"),
    el("span", {}, `${from}–${until} of ${answer.matching}`),
    el("button", { type: "button", disabled: view.offset === 0, on: { click: turn(Math.max(0, view.offset - PAGE_ROWS)) } }, "Back"),
    el("button", { type: "button", disabled: until >= answer.matching, on: { click: turn(view.offset + PAGE_ROWS) } }, "More"),
  );
}

/** Show one image with all its parts. */
export async function showImage(name) {
  let answer;
  try {
    answer = await get("/images/show", { image: name });
  } catch (error) {
    openDialog(name, [el("p", { class: "problem" }, error.message)]);
    return;
  }
  const { image, nodes } = answer;
  const digests = image.tag
    ? (await get("/images/history", { image: name }).catch(() => ({ digests: [] }))).digests
    : [];
  openDialog(image.name, [
    el("p", {}, stateChips(image), Object.values(reasons(image)).filter(Boolean).join(" · ")),
    el("dl", { class: "facts" }, [
      ["Size", bytes(image.size)],
      ["Removing frees", bytes(image.unique)],
      ["Last used", ago(image.last_used)],
      ["Upstream confirmed", ago(image.confirmed)],
      ["Platforms", image.platforms.join(", ") || "–"],
    ].map(([title, value]) => el("div", {}, el("dt", {}, title), el("dd", {}, value))),
    el("div", { class: "wide" }, el("dt", {}, "Digest"), el("dd", {}, el("code", {}, image.digest)))),
    !isReadOnly && el("div", { class: "actions" }, actions(image, "")),
    treeTable(nodes),
    digests.length > 1 && historyTable(digests),
  ]);
}

function treeTable(nodes) {
  return el(
    "div",
    { class: "scroll", tabindex: 0, role: "group", "aria-label": "Parts" },
    el("table", { class: "small tree" },
      el("thead", {}, el("tr", {}, ["Part", "Digest", "Size", "Shared with"].map((title, index) =>
        el("th", { scope: "col", class: index > 1 ? "number" : "" }, title)))),
      el("tbody", {}, nodes.map((node) => {
        const first = el("td", {}, node.platform ? `${node.type} ${node.platform}` : node.type);
        first.style.paddingLeft = `${0.75 + node.depth * 1.1}rem`;
        return el("tr", { class: node.is_cached ? "" : "absent" },
          first,
          el("td", {}, el("code", { title: node.digest }, shortDigest(node.digest)), !node.is_cached && " not cached"),
          el("td", { class: "number" }, bytes(node.size)),
          el("td", { class: "number", title: node.shared_with.slice(0, 8).join("\n") || null }, node.shared_with.length ? plural(node.shared_with.length, "image") : "–"));
      }))),
  );
}

function historyTable(digests) {
  return el(
    "div",
    { class: "scroll", tabindex: 0, role: "group", "aria-label": "Digests of the tag" },
    el("table", { class: "small" },
      el("thead", {}, el("tr", {}, ["Digest", "First seen", "Last seen"].map((title) => el("th", { scope: "col" }, title)))),
      el("tbody", {}, digests.slice(0, 20).map((one) =>
        el("tr", {}, el("td", {}, el("code", { title: one.digest }, shortDigest(one.digest))),
          el("td", {}, moment(one.first_seen)), el("td", {}, moment(one.last_seen)))))),
  );
}

/** Begin. */
export function startImages() {
  const form = byId("images-filter");
  let timer = 0;
  const refresh = () => {
    clearTimeout(timer);
    timer = setTimeout(() => {
      view.search = form.elements.search.value.trim();
      view.state = form.elements.state.value;
      view.offset = 0;
      refreshImages().catch((error) => toast(error.message, true));
    }, 150);
  };
  form.addEventListener("input", refresh);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    refresh();
  });
  byId("warm-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const input = event.target.elements.image;
    if (await warm(input.value.trim())) input.value = "";
  });
  document.addEventListener("keydown", (event) => {
    const isTyping = event.target.closest?.("input, select, textarea, dialog");
    if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || isTyping) return;
    event.preventDefault();
    byId("images").scrollIntoView();
    form.elements.search.focus();
  });
}
