// Pulls in flight, the latest ones, those that were refused, and the timeline of one.

import { get } from "./api.js";
import { openDialog } from "./dialogs.js";
import { byId, chip, el, fill, keyed, setText, setWidth } from "./dom.js";
import { ago, bytes, moment, plural, rate, seconds, shortDigest } from "./format.js";

const OUTCOMES = ["hit", "join", "miss", "aside", "revalidated", "stale", "negative", "denied", "rejected", "error", "pushed", "deleted"];
const OUTCOME_KIND = {
  hit: "good", join: "good", revalidated: "good", pushed: "accent", deleted: "warn", stale: "warn", negative: "warn",
  denied: "bad", rejected: "bad", error: "bad",
};

/** A chip for the outcome of a pull. */
export function outcomeChip(outcome) {
  return chip(outcome, OUTCOME_KIND[outcome] ?? "");
}

// --- in flight ---------------------------------------------------------------------------------

function makeFetch() {
  return el(
    "li",
    {},
    el("div", { class: "line-1" }, el("strong"), el("span", { class: "number" })),
    el("div", { class: "progress", role: "progressbar", "aria-valuemin": "0", "aria-valuemax": "100" }, el("i")),
    el("div", { class: "line-2" }, ...Array.from({ length: 5 }, () => el("span"))),
  );
}

function updateFetch(item, row) {
  const [first, progress, second] = item.children;
  const ratio = row.size ? row.position / row.size : null;
  setText(first.children[0], `${row.upstream}/${row.repository}`);
  setText(first.children[1], row.size ? `${bytes(row.position)} of ${bytes(row.size)}` : bytes(row.position));
  progress.classList.toggle("unknown", ratio === null);
  progress.setAttribute("aria-label", `Fetch of ${row.repository}`);
  if (ratio === null) {
    progress.removeAttribute("aria-valuenow");
    progress.firstChild.style.width = "";
  } else {
    progress.setAttribute("aria-valuenow", String(Math.round(ratio * 100)));
    setWidth(progress.firstChild, ratio);
  }
  const rest = row.size && row.rate ? (row.size - row.position) / row.rate : null;
  const facts = [
    shortDigest(row.digest),
    rate(row.rate),
    row.connections ? plural(row.connections, "connection") : "fetched by another process",
    plural(row.followers, "follower"),
    rest === null ? "" : `${seconds(Math.max(0, rest))} left`,
  ];
  facts.forEach((text, index) => setText(second.children[index], text));
}

/** Show the pulls in flight. `live`: the live state. */
export function showLive(live) {
  keyed(byId("fetches"), live.fetches, (row) => row.digest, makeFetch, updateFetch);
  byId("fetches-empty").hidden = live.fetches.length > 0;
  const more = live.counts.fetches - live.fetches.length;
  setText(byId("pulls-count"), more > 0 ? `and ${more} more` : live.workers > 1 ? `${live.workers} workers` : "");
  byId("requests").hidden = live.counts.requests === 0;
  setText(byId("requests-count"), `${plural(live.counts.requests, "request")} of clients in flight`);
  keyed(
    byId("requests-rows"),
    live.requests,
    (row) => row.id,
    () => el("tr", {}, el("td"), el("td", { class: "name" }), el("td"), ...Array.from({ length: 3 }, () => el("td", { class: "number" }))),
    (line, row) => {
      const reference = row.reference.includes(":") ? `@${shortDigest(row.reference)}` : `:${row.reference}`;
      const texts = [row.client, `${row.upstream}/${row.repository}${row.reference ? reference : ""}`, row.outcome,
        bytes(row.bytes_sent), rate(row.rate), seconds(row.duration)];
      texts.forEach((text, index) => setText(line.children[index], text));
    },
  );
}

// --- ended -------------------------------------------------------------------------------------

function pullTable(pulls, empty, isRefused) {
  if (!pulls.length) return el("p", { class: "empty" }, empty);
  const titles = isRefused
    ? ["When", "Client", "Image", "Why"]
    : ["When", "Client", "Image", "Outcome", "Sent", "Time"];
  const cell = (label, attributes, ...children) =>
    el("td", { ...attributes, data: label ? { label } : {} }, ...children);
  return el(
    "div",
    { class: "scroll" },
    el(
      "table",
      { class: "rows" },
      el("thead", {}, el("tr", {}, titles.map((title, index) => el("th", { scope: "col", class: !isRefused && index > 3 ? "number" : "" }, title)))),
      el("tbody", {}, pulls.map((pull) =>
        el(
          "tr",
          {},
          cell("", { title: moment(pull.at) }, ago(pull.at)),
          cell("", {}, pull.client),
          cell("", { class: "name" }, el("button", { class: "link", type: "button", on: { click: () => showTimeline(pull.id) } }, pull.name || pull.kind)),
          isRefused
            ? cell("", { class: "name" }, outcomeChip(pull.outcome), ` ${pull.status} ${pull.error}`)
            : [
                cell("", {}, outcomeChip(pull.outcome)),
                cell("Sent", { class: "number" }, bytes(pull.bytes_sent)),
                cell("Time", { class: "number" }, seconds(pull.duration)),
              ],
        ))),
    ),
  );
}

/** Read the latest pulls. */
export async function refreshRecent() {
  const form = new FormData(byId("pulls-filter"));
  const { pulls } = await get("/pulls", { image: form.get("image").trim(), outcome: form.get("outcome"), limit: 12 });
  fill(byId("recent"), pullTable(pulls, "No pull matches.", false));
}

/** Read what was refused. */
export async function refreshRefused() {
  const { pulls } = await get("/refused", { limit: 12 });
  fill(byId("refused-table"), pullTable(pulls, "Nothing was refused lately.", true));
}

/** Show the timeline of one pull. */
export async function showTimeline(id) {
  let answer;
  try {
    answer = await get(`/pulls/${encodeURIComponent(id)}`);
  } catch (error) {
    openDialog("Pull", [el("p", { class: "problem" }, error.message)]);
    return;
  }
  const { pull, stages, explanation } = answer;
  const longest = Math.max(pull.duration, ...stages.map((stage) => stage.seconds), 1e-9);
  openDialog(pull.name || pull.kind, [
    el("p", {}, outcomeChip(pull.outcome), ` ${pull.status} · ${moment(pull.at)} · ${pull.client}`),
    explanation.length > 0 && el("ul", { class: "sentences" }, explanation.map((text) => el("li", {}, text))),
    el("div", { class: "stages", role: "list", "aria-label": "Stages" }, stages.map((stage) =>
      el(
        "div",
        { class: "stage", role: "listitem" },
        el("span", {}, stage.name),
        el("span", { class: "track" }, setWidth(el("i"), stage.seconds / longest)),
        el("span", { class: "number" }, seconds(stage.seconds)),
      ))),
    el("dl", { class: "facts" }, [
      ["Sent", bytes(pull.bytes_sent)],
      ["Time", seconds(pull.duration)],
      ["Rate", pull.duration > 0 ? rate(pull.bytes_sent / pull.duration) : "–"],
      ["Id", pull.id],
    ].map(([title, value]) => el("div", {}, el("dt", {}, title), el("dd", {}, value)))),
    pull.error && el("p", { class: "problem" }, pull.error),
  ]);
}

/** Begin. */
export function startPulls() {
  const form = byId("pulls-filter");
  for (const outcome of OUTCOMES) form.elements.outcome.append(el("option", { value: outcome }, outcome));
  let timer = 0;
  const refresh = () => {
    clearTimeout(timer);
    timer = setTimeout(() => refreshRecent().catch(() => {}), 200);
  };
  form.addEventListener("input", refresh);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    refresh();
  });
}

