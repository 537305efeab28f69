// The health of the upstreams.

import { byId, chip, el, fill } from "./dom.js";
import { ago, count, percent, plural, seconds } from "./format.js";

const STATES = {
  ok: ["working", "good"],
  unused: ["not asked yet", ""],
  failing: ["failing", "warn"],
  open: ["given a rest", "bad"],
};
const SEVERITY = ["unused", "ok", "failing", "open"];
const REASONS = {
  no_gain: "one more connection brought no more",
  slow_ranges: "ranges were slow",
  rate_limited: "the rate is limited",
  reclaimed: "another blob needed the connections",
  no_ranges: "ranges are not supported",
  failed: "ranges failed",
};

let shown = "";

/** Show the upstreams. `names`: those of the configuration. */
export function showUpstreams(upstreams, names) {
  const all = [...new Set([...names, ...Object.keys(upstreams)])];
  // Redrawn once a minute too, as it has ages.
  const state = JSON.stringify([all, upstreams, Math.floor(Date.now() / 60000)]);
  if (state === shown) return;
  shown = state;
  fill(byId("upstream-cards"), all.length
    ? all.map((name) => card(name, upstreams[name]))
    : el("p", { class: "empty" }, "No upstream is configured."));
}

function card(name, upstream) {
  const endpoints = Object.entries(upstream?.endpoints ?? {});
  const worst = endpoints.reduce((state, [, one]) =>
    SEVERITY.indexOf(one.state) > SEVERITY.indexOf(state) ? one.state : state, "unused");
  const [text, kind] = STATES[worst];
  const limit = upstream?.rate_limit;
  return el(
    "article",
    { class: "card upstream" },
    el("h3", {}, name, chip(text, kind)),
    el("ul", {},
      endpoints.map(([url, one]) => endpoint(url, one)),
      limit && rateLimit(limit),
      (upstream?.back_offs ?? []).slice(-3).reverse().map((row) =>
        el("li", { class: "muted" }, `Fewer connections (${row.connections}) ${ago(row.at)}: ${REASONS[row.reason] ?? row.reason}`)),
      endpoints.length === 0 && el("li", { class: "muted" }, "No request since the server started."),
    ),
  );
}

function endpoint(url, one) {
  return el(
    "li",
    {},
    el("div", {}, url),
    el("div", { class: "muted" },
      `${plural(one.requests, "request")}, ${plural(one.failures, "failure")}`,
      one.last_at ? ` · last ${one.last_status || "no response"} in ${seconds(one.last_seconds)}, ${ago(one.last_at)}` : ""),
    one.rate_limited && el("div", { class: "muted" }, `Rate limited ${ago(one.rate_limited)}`),
    one.last_error && el("div", { class: one.state === "ok" ? "muted" : "error" }, `${ago(one.last_failure)}: ${one.last_error}`),
  );
}

function rateLimit(limit) {
  const ratio = limit.limit ? limit.remaining / limit.limit : 0;
  const meter = el("meter", { min: 0, max: limit.limit, value: limit.remaining, low: limit.limit * 0.2, optimum: limit.limit, "aria-label": "Pulls left" });
  return el(
    "li",
    {},
    el("div", {}, `${count(limit.remaining)} of ${count(limit.limit)} pulls left (${percent(ratio)})`),
    meter,
    el("div", { class: "muted" }, `in ${seconds(limit.window)} · as of ${ago(limit.seen)}`),
  );
}
