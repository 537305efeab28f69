// Begin: ask for the token if one is needed, then read everything, and follow the events.

import { follow, get, hasToken, setToken } from "./api.js";
import { closeDialog, openDialog, toast } from "./dialogs.js";
import { byId, el } from "./dom.js";
import { refreshImages, setReadOnly, showImage, startImages } from "./images.js";
import { showJobs, startJobs } from "./jobs.js";
import { refreshSavings, refreshUsage, setSession, showStorage, startOverview } from "./overview.js";
import { refreshRecent, refreshRefused, showLive, startPulls } from "./pulls.js";
import { showUpstreams } from "./upstreams.js";
import { refreshUsers } from "./users.js";

const SLOW_INTERVAL_MS = 30_000;
const FAST_INTERVAL_MS = 5_000;

let session = null;

function setStatus(state) {
  const status = byId("status");
  status.dataset.state = state;
  status.textContent = state === "live" ? "live" : "connection lost";
}

/** Ask for the token until one is right. Returns the session. */
async function signIn() {
  // A request without a token would be refused, and stay in the console as an error.
  const { is_open: isOpen } = await get("/access");
  for (let detail = ""; ;) {
    if (!isOpen && !hasToken()) await askForToken(detail);
    try {
      return await get("/session");
    } catch (error) {
      if (error.status !== 401) throw error;
      detail = "This token is not right.";
      setToken("");
    }
  }
}

function askForToken(detail) {
  return new Promise((resolve) => {
    const input = el("input", { type: "password", name: "token", required: true, autocomplete: "current-password", minlength: 16 });
    const form = el(
      "form",
      {
        class: "dialog-body",
        on: {
          submit: (event) => {
            event.preventDefault();
            setToken(input.value.trim());
            closeDialog();
            resolve();
          },
        },
      },
      el("p", {}, "A token of ", el("code", {}, "admin.token_file"), " is needed. It is kept in this tab until you close it."),
      el("label", { class: "field" }, "Token", input),
      detail && el("p", { class: "problem", role: "alert" }, detail),
      el("div", { class: "dialog-foot" }, el("button", { type: "submit", class: "primary" }, "Sign in")),
    );
    form.style.padding = "0";
    openDialog("Sign in to oci-mirror", [form], { isNarrow: true, canClose: false });
    input.focus();
  });
}

/** Run a read now and at each interval, as long as the page is seen. An error is shown once. */
function repeat(read, interval) {
  let hasFailed = false;
  let timer = 0;
  const run = async () => {
    clearTimeout(timer);
    if (!document.hidden) {
      try {
        await read();
        hasFailed = false;
      } catch (error) {
        if (error.status === 401) location.reload();
        if (!hasFailed && error.status) toast(error.message, true);
        hasFailed = true;
      }
    }
    timer = setTimeout(run, interval);
  };
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) run();
  });
  run();
  return run;
}

async function start() {
  startOverview();
  startPulls();
  startImages();
  startJobs();
  session = await signIn();
  setSession(session);
  setReadOnly(session.role !== "full");
  document.body.classList.toggle("read-only", session.role !== "full");
  byId("version").textContent = `oci-mirror ${session.version}`;
  byId("sign-out").hidden = session.is_open;
  byId("openapi").hidden = !session.is_open;
  byId("sign-out").addEventListener("click", () => {
    setToken("");
    location.reload();
  });

  // In this order, since the server answers one after the other: the use of the disk takes longest.
  repeat(refreshSavings, SLOW_INTERVAL_MS);
  repeat(refreshRecent, FAST_INTERVAL_MS);
  repeat(refreshRefused, FAST_INTERVAL_MS);
  const readImages = repeat(refreshImages, SLOW_INTERVAL_MS);
  const readUsage = repeat(() => refreshUsage(showImage), SLOW_INTERVAL_MS);

  repeat(refreshUsers, SLOW_INTERVAL_MS);

  const onChanged = () => {
    readImages();
    readUsage();
  };
  follow(
    {
      live: (live) => {
        showLive(live);
        showUpstreams(live.upstreams, session.upstreams);
        showStorage(live.storage);
      },
      jobs: ({ jobs }) => {
        if (showJobs(jobs)) onChanged();
      },
      changed: onChanged,
    },
    setStatus,
  ).catch(() => location.reload());
}

start().catch((error) => toast(error.message, true));
