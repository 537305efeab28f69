// One dialog at a time, and short messages.

import { byId, el, fill } from "./dom.js";

const dialog = byId("dialog");

/** Open the dialog. `body`: nodes. `is_narrow`: for a question. Escape closes it. */
export function openDialog(title, body, { isNarrow = false, canClose = true } = {}) {
  dialog.className = isNarrow ? "narrow" : "";
  const close = el("button", { type: "button", class: "quiet", "aria-label": "Close", on: { click: closeDialog } }, "✕");
  fill(
    dialog,
    el("div", { class: "dialog-head" }, el("h2", { id: "dialog-title" }, title), canClose && close),
    el("div", { class: "dialog-body" }, body),
  );
  dialog.oncancel = (event) => {
    if (!canClose) event.preventDefault();
  };
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
}

/** Close the dialog. */
export function closeDialog() {
  dialog.close();
}

/** Whether a dialog is open. */
export function isDialogOpen() {
  return dialog.open;
}

/**
 * Ask before a change. `fields`: [{name, label}] that have to be filled in. `act`: an async function
 * of their values; its error is shown, and the dialog stays.
 */
export function ask({ title, text, button, isDangerous = false, fields = [], act }) {
  const problem = el("p", { class: "problem", role: "alert" });
  const inputs = fields.map(({ name, label, value = "" }) =>
    el("label", { class: "field" }, label, el("input", { name, value, required: true, maxlength: 300, autocomplete: "off" })));
  const submit = el("button", { type: "submit", class: `primary ${isDangerous ? "danger" : ""}` }, button);
  const form = el(
    "form",
    {
      class: "dialog-body",
      on: {
        submit: async (event) => {
          event.preventDefault();
          submit.disabled = true;
          problem.textContent = "";
          try {
            await act(Object.fromEntries(new FormData(form)));
            closeDialog();
          } catch (error) {
            problem.textContent = error.message;
          } finally {
            submit.disabled = false;
          }
        },
      },
    },
    el("p", {}, text),
    inputs,
    problem,
    el("div", { class: "dialog-foot" }, el("button", { type: "button", on: { click: closeDialog } }, "Cancel"), submit),
  );
  form.style.padding = "0";
  openDialog(title, [form], { isNarrow: true });
  (form.querySelector("input") ?? submit).focus();
}

/** Show a short message for some seconds. */
export function toast(text, isBad = false) {
  const message = el("p", { class: `toast ${isBad ? "bad" : ""}` }, text);
  byId("toasts").append(message);
  setTimeout(() => message.remove(), isBad ? 8000 : 4000);
}

/** Show what a change has done, and what has to be known about it. */
export function showChange({ text = "", notes = [] } = {}) {
  if (text) toast(text);
  for (const note of notes) toast(note, true);
}

/** Run a change that needs no question; show its result or its error. */
export async function attempt(change) {
  try {
    const result = await change();
    showChange(result);
    return result;
  } catch (error) {
    toast(error.message, true);
    return null;
  }
}
