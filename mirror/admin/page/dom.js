// Make elements. Text is only ever set as text: nothing that a registry or a client has sent can
// become markup.

/** Return the element with an id. It has to exist. */
export function byId(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`no element ${id}`);
  return found;
}

/**
 * Make an element.
 * `attributes`: `on` is {event: listener}, `data` is {name: value}, true sets an attribute without a
 * value, and null or false leaves it out. `children`: nodes or texts; null is left out.
 */
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) made.addEventListener(event, listener);
    } else if (name === "data") {
      for (const [key, text] of Object.entries(value)) made.dataset[key] = text;
    } else {
      made.setAttribute(name, value === true ? "" : String(value));
    }
  }
  add(made, children);
  return made;
}

/** Append nodes and texts. */
export function add(parent, children) {
  for (const child of children.flat()) {
    if (child !== null && child !== undefined && child !== false) parent.append(child);
  }
  return parent;
}

/** Replace all children. */
export function fill(parent, ...children) {
  parent.replaceChildren();
  return add(parent, children);
}

/** Set the text, if it has changed: so a selection in it stays. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Set a width in percent. */
export function setWidth(node, ratio) {
  node.style.width = `${Math.max(0, Math.min(1, ratio)) * 100}%`;
  return node;
}

/**
 * Keep the children of a list in step with rows. An element is kept as long as its row is there: so
 * focus stays, and bars move.
 */
export function keyed(parent, rows, keyOf, make, update) {
  const existing = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  rows.forEach((row, index) => {
    const key = keyOf(row);
    let child = existing.get(key);
    existing.delete(key);
    if (!child) {
      child = make(row);
      child.dataset.key = key;
    }
    update(child, row);
    if (parent.children[index] !== child) parent.insertBefore(child, parent.children[index] ?? null);
  });
  for (const child of existing.values()) child.remove();
}

/** A chip. `kind`: good, warn, bad, accent or empty. */
export function chip(text, kind = "") {
  return el("span", { class: `chip ${kind}` }, text);
}
