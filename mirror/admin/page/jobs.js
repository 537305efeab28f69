// Jobs: what runs, what has ended, and the buttons that start some.

import { post } from "./api.js";
import { ask, attempt, openDialog, toast } from "./dialogs.js";
import { byId, chip, el, fill, keyed, setText, setWidth } from "./dom.js";
import { ago, bytes, count } from "./format.js";

const STATE_KIND = { waiting: "", running: "accent", done: "good", failed: "bad", cancelled: "warn" };
const NAMES = {
  warm: "Warm", refresh: "Refresh", forget: "Forget", remove: "Remove", gc: "Collect garbage", prune: "Prune", verify: "Verify",
};

function describe(job) {
  const given = job.arguments;
  const parts = [given.images?.join(", ") ?? given.image ?? "", given.dry_run ? "dry run" : "", given.repair ? "with repair" : ""];
  return parts.filter(Boolean).join(" · ");
}

function amount(job, number) {
  return job.progress.unit === "bytes" ? bytes(number) : `${count(number)} ${job.progress.unit}`;
}

function statusText(job) {
  if (job.error) return job.error;
  if (job.state === "waiting") return "waits for its turn";
  if (job.state === "running") {
    const { done, total, text } = job.progress;
    const far = total === null ? amount(job, done) : `${amount(job, done)} of ${amount(job, total)}`;
    return [far, text].filter((part) => part.trim()).join(" · ");
  }
  return [ago(job.ended), resultText(job.result)].filter(Boolean).join(" · ");
}

function resultText(result) {
  if (!result) return "";
  return Object.entries(result)
    .filter(([, value]) => typeof value === "number" || typeof value === "string")
    .slice(0, 4)
    .map(([key, value]) => {
      const name = key.replaceAll("_", " ");
      const isSize = typeof value === "number" && /bytes|freed|size/.test(key);
      return `${name} ${isSize ? bytes(value) : value}`;
    })
    .join(", ");
}

function make(job) {
  return el(
    "li",
    {},
    el("div", {}, el("button", { class: "link", type: "button", on: { click: () => show(job.id) } }), " ", el("span", { class: "chip" })),
    el("button", { type: "button", class: "quiet changes", on: { click: () => attempt(() => post(`/jobs/${job.id}/cancel`)) } }, "Cancel"),
    el("p", { class: "muted" }),
    el("div", { class: "progress" }, el("i")),
  );
}

function update(item, job) {
  const [title, cancel, text, progress] = item.children;
  setText(title.children[0], [NAMES[job.kind] ?? job.kind, describe(job)].filter(Boolean).join(" "));
  const state = title.children[1];
  setText(state, job.state);
  state.className = `chip ${STATE_KIND[job.state] ?? ""}`;
  const isRunning = job.state === "running" || job.state === "waiting";
  cancel.hidden = !isRunning;
  cancel.setAttribute("aria-label", `Cancel ${job.kind}`);
  setText(text, statusText(job));
  progress.hidden = job.state !== "running";
  const { done, total } = job.progress;
  progress.classList.toggle("unknown", !total);
  if (total) setWidth(progress.firstChild, done / total);
  else progress.firstChild.style.width = "";
}

/** Job -> when it ended, as of the last call. Null before the first one. */
let known = null;
let current = [];

/** Show the jobs. Returns whether one has ended since the last call. */
export function showJobs(jobs) {
  current = jobs;
  keyed(byId("job-list"), jobs, (job) => job.id, make, update);
  byId("jobs-empty").hidden = jobs.length > 0;
  // A short job may begin and end between two calls.
  const ended = known === null ? [] : jobs.filter((job) => job.ended && !known.get(job.id));
  for (const job of ended) {
    if (job.state === "failed") toast(`${NAMES[job.kind] ?? job.kind}: ${job.error}`, true);
    else toast(`${NAMES[job.kind] ?? job.kind} ${job.state}`);
  }
  known = new Map(jobs.map((job) => [job.id, job.ended]));
  return ended.length > 0;
}

function show(id) {
  const job = current.find((one) => one.id === id);
  if (!job) return;
  openDialog(`${NAMES[job.kind] ?? job.kind}`, [
    el("p", {}, chip(job.state, STATE_KIND[job.state] ?? ""), describe(job)),
    job.error && el("p", { class: "problem" }, job.error),
    job.result && el("pre", { class: "scroll mono", tabindex: 0 }, JSON.stringify(job.result, null, 2)),
    !job.result && !job.error && el("p", { class: "muted" }, statusText(job)),
  ]);
}

/** Begin. */
export function startJobs() {
  const button = (text, act) => el("button", { type: "button", on: { click: act } }, text);
  const start = (kind, body) => attempt(() => post(`/jobs/${kind}`, body));
  fill(
    byId("job-actions"),
    button("Collect garbage…", () => ask({
      title: "Collect garbage",
      text: "Content that no image refers to is removed, and files that were left over.",
      button: "Collect",
      act: () => post("/jobs/gc", {}),
    })),
    button("Verify", () => start("verify", {})),
    button("Prune…", () => ask({
      title: "Prune images",
      text: "Images that match and were not used for so many days are removed. Pinned ones stay.",
      button: "Prune",
      isDangerous: true,
      fields: [{ name: "match", label: "Pattern of image names", value: "*" }, { name: "days", label: "Days since the last use", value: "30" }],
      act: ({ match, days }) => post("/jobs/prune", { match, older_than: Math.round(Number(days) * 86400) }),
    })),
  );
}
