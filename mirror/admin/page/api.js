// Requests to the API, the token, and the stream of events.

const PREFIX = "/admin/v1";
const TOKEN_KEY = "oci-mirror-token";

/** A refusal of the API. */
export class ApiError extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

let token = sessionStorage.getItem(TOKEN_KEY) ?? "";

/** Keep the token for this tab, until it is closed. An empty one is forgotten. */
export function setToken(text) {
  token = text;
  if (text) sessionStorage.setItem(TOKEN_KEY, text);
  else sessionStorage.removeItem(TOKEN_KEY);
}

/** Whether there is a token. */
export function hasToken() {
  return token !== "";
}

async function send(method, path, body) {
  const headers = {};
  if (token) headers.Authorization = `Bearer ${token}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(PREFIX + path, {
      method,
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      credentials: "omit",
    });
  } catch {
    throw new ApiError(0, "the server cannot be reached");
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new ApiError(response.status, answer.detail ?? `status ${response.status}`);
  return answer;
}

/** Read. `query`: empty values are left out. */
export function get(path, query = {}) {
  const given = Object.entries(query).filter(([, value]) => value !== "" && value !== null);
  const text = new URLSearchParams(given).toString();
  return send("GET", text ? `${path}?${text}` : path);
}

/** Change. */
export function post(path, body) {
  return send("POST", path, body);
}

/**
 * Follow the events, for ever. `handlers`: event name -> function of its data. `onState`: called
 * with "live" or "lost". An `EventSource` sends no token: each connection begins with a ticket.
 */
export async function follow(handlers, onState) {
  for (let wait = 1; ; wait = Math.min(wait * 2, 30)) {
    try {
      const { ticket } = await post("/events/ticket");
      await new Promise((resolve) => {
        const source = new EventSource(`${PREFIX}/events?ticket=${encodeURIComponent(ticket)}`);
        source.onopen = () => {
          wait = 1;
          onState("live");
        };
        source.onerror = () => {
          source.close();
          resolve();
        };
        for (const [name, handle] of Object.entries(handlers)) {
          source.addEventListener(name, (event) => handle(JSON.parse(event.data)));
        }
      });
    } catch (error) {
      if (error.status === 401) throw error;
    }
    onState("lost");
    await new Promise((resolve) => setTimeout(resolve, wait * 1000));
  }
}
