// Hit ratio, bytes saved, and the disk.

import { get, post } from "./api.js";
import { attempt } from "./dialogs.js";
import { byId, el, fill, setWidth } from "./dom.js";
import { ago, bytes, count, percent, plural, saving, shortDigest } from "./format.js";
import { Plot } from "./plot.js";

const MAX_UPLOADS = 20;
const KINDS = ["layer", "config", "manifest", "index", "referrer", "other"];
const PERIOD_TEXT = { hour: "last hour", day: "last day", month: "last 30 days" };

const hits = new Plot(byId("plot-hits"), {
  series: [{ label: "Hit ratio", valueOf: (point) => point.hit_ratio }],
  max: 1,
  format: (value) => `${Math.round(value * 100)} %`,
  describe: (points) => `Hit ratio over time, ${points.length} points, latest ${percent(points.at(-1).hit_ratio)}`,
});
const saved = new Plot(byId("plot-bytes"), {
  series: [
    { label: "Saved", valueOf: (point) => Math.max(0, point.bytes_saved) },
    { label: "Fetched", valueOf: (point) => point.bytes_fetched },
  ],
  base: 1024,
  format: bytes,
  describe: (points) => {
    const { value, remark } = saving(points.reduce((sum, point) => sum + point.bytes_saved, 0));
    const fetched = points.reduce((sum, point) => sum + point.bytes_fetched, 0);
    return `Bytes over time: ${value} saved${remark && ` (${remark})`}, ${bytes(fetched)} fetched`;
  },
});

let session = null;
const totals = { hour: null, day: null };

/** Remember the quota and the water marks. */
export function setSession(value) {
  session = value;
}

function period() {
  return document.querySelector('input[name="period"]:checked').value;
}

function tile(title, value, note) {
  return el("div", { class: "tile" }, el("dt", {}, title), el("dd", {}, value), el("dd", { class: "note" }, note));
}

/** Read the savings of the chosen period, and those of the tiles. */
export async function refreshSavings() {
  const chosen = period();
  const wanted = [...new Set(["hour", "day", chosen])];
  const answers = await Promise.all(wanted.map((one) => get("/savings", { period: one })));
  wanted.forEach((one, index) => {
    totals[one] = answers[index].totals;
  });
  const shown = answers[wanted.indexOf(chosen)];
  if (chosen !== period()) return;
  hits.show(shown.points);
  saved.show(shown.points);
  drawTiles(chosen);
}

let storage = null;

/** Show the use of the disk, as it was measured last. */
export function showStorage(value) {
  storage = value;
  drawTiles(period());
}

function drawTiles(chosen) {
  const { hour, day } = totals;
  if (!hour || !day) return;
  const third = totals[chosen];
  const used = storage?.bytes ?? null;
  const { value, remark } = saving(third.bytes_saved);
  const requests = `${count(Math.max(0, third.billable_saved))} billable requests saved`;
  const quota = storage?.quota ?? session?.quota ?? null;
  fill(
    byId("tiles"),
    tile("Hit ratio, last hour", percent(hour.hit_ratio), plural(hour.requests, "request")),
    tile("Hit ratio, last day", percent(day.hit_ratio), plural(day.requests, "request")),
    tile(
      `Saved, ${PERIOD_TEXT[chosen]}`,
      value,
      [remark, requests].filter(Boolean).join(" · "),
    ),
    tile(
      "Disk",
      used === null ? "–" : percent(used / quota),
      used === null ? "not measured yet" : `${bytes(used)} of ${bytes(quota)}${storage.is_writable ? "" : " · not writable"}`,
    ),
  );
}

/** Read what takes up the disk, and what goes next. */
export async function refreshUsage(openImage) {
  const usage = await get("/usage");
  drawDisk(usage);
  drawNext(usage, openImage);
  const { uploads } = usage.hosted?.uploads ? await get("/uploads") : { uploads: [] };
  drawHosted(usage.hosted, uploads);
}

function drawHosted(hosted, uploads) {
  byId("hosted").hidden = !hosted;
  if (!hosted) return;
  const items = uploads.slice(0, MAX_UPLOADS).map((upload) =>
    el(
      "li",
      {},
      el("code", {}, upload.repository),
      el("span", { class: "number" }, bytes(upload.size)),
      el("span", { class: "why" },
        `by ${upload.user ?? "an anonymous user"} · started ${ago(upload.started)} · last byte ${ago(upload.last_byte)}`),
      el("button", {
        type: "button", class: "quiet changes", "aria-label": `Cancel the upload to ${upload.repository}`,
        on: { click: () => attempt(() => post(`/uploads/${upload.id}/cancel`)) },
      }, "Cancel"),
    ));
  fill(
    byId("hosted"),
    el("h3", {}, "Hosted"),
    el("p", { class: "muted" },
      `${bytes(hosted.bytes)} of ${bytes(hosted.quota)} in ${plural(hosted.contents, "content")}, never evicted`
      + (hosted.metadata ? ` · ${bytes(hosted.metadata)} of metadata` : "")
      + (hosted.reserved ? ` · ${bytes(hosted.reserved)} reserved by uploads` : "")),
    items.length ? el("ul", { class: "going" }, items) : el("p", { class: "empty" }, "No upload is in progress."),
    uploads.length > MAX_UPLOADS && el("p", { class: "muted" }, `And ${plural(uploads.length - MAX_UPLOADS, "more upload")}`),
  );
}

function drawDisk(usage) {
  const rows = KINDS.map((kind) => usage.rows.find((row) => row.type === kind)).filter(Boolean);
  const parts = rows.filter((row) => row.size > 0).map((row) => {
    const part = el("i", { class: `k-${row.type}` });
    return setWidth(part, row.size / usage.quota);
  });
  const mark = (at, name) => {
    const line = el("div", { class: `mark ${name}` }, el("span", {}, `${name} ${percent(at / usage.quota)}`));
    line.style.left = `${Math.min(100, (at / usage.quota) * 100)}%`;
    return line;
  };
  const gauge = el(
    "div",
    { class: "gauge", role: "img", "aria-label": `${bytes(usage.bytes)} of ${bytes(usage.quota)} used` },
    el("div", { class: "parts" }, parts),
    session && mark(session.low_water, "low"),
    session && mark(session.high_water, "high"),
  );
  fill(
    byId("disk"),
    el("h3", {}, "Disk"),
    el("p", { class: "muted" }, `${bytes(usage.bytes)} of ${bytes(usage.quota)} in ${plural(usage.contents, "content")}`),
    gauge,
    el("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": "By type" }, el(
      "table",
      { class: "small" },
      el("thead", {}, el("tr", {}, ["Type", "Total", "Active", "Size", "Reclaimable"].map((text, index) =>
        el("th", { scope: "col", class: index ? "number" : "" }, text)))),
      el("tbody", {}, rows.map((row) =>
        el(
          "tr",
          {},
          el("td", {}, el("i", { class: `k-${row.type}` }), row.type),
          [count(row.total), count(row.active), bytes(row.size), bytes(row.reclaimable)].map((text) =>
            el("td", { class: "number" }, text)),
        ))),
    )),
  );
}

function drawNext(usage, openImage) {
  const items = usage.next.map((row) =>
    el(
      "li",
      {},
      row.images.length
        ? el("button", { class: "link", type: "button", on: { click: () => openImage(row.images[0]) } }, row.images[0])
        : el("code", {}, shortDigest(row.digest)),
      el("span", { class: "number" }, bytes(row.size)),
      el("span", { class: "why" }, `${row.why} · used ${ago(row.last_used)}`),
    ));
  fill(
    byId("next"),
    el("h3", {}, "Next to go"),
    el("p", { class: "muted" }, "What eviction takes first when the disk is at its high water mark"),
    items.length ? el("ul", { class: "going" }, items) : el("p", { class: "empty" }, "Nothing can be evicted."),
  );
}

/** Begin. */
export function startOverview() {
  byId("period").addEventListener("change", () => refreshSavings().catch(() => {}));
}
