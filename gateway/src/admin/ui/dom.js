// Builds and updates nodes. Texts of the gateway are set as text, never as markup.

export const byId = id => document.getElementById(id);

export function make(tag, text = "", className = "") {
  const node = document.createElement(tag);
  if (text !== "") node.textContent = text;
  if (className) node.className = className;
  return node;
}

/// Changes a text only where it differs: a selection and the position of a screen reader stay.
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function setClass(node, className) {
  if (node.className !== className) node.className = className;
}

const nodesOf = new WeakMap();

/// Makes the children of `parent` those of `items`. A node lives as long as the key of its item, so
/// that the focus stays where it is.
export function sync(parent, items, { key, create, update }) {
  const before = nodesOf.get(parent) ?? new Map();
  const after = new Map();
  items.forEach((item, index) => {
    const name = key(item);
    const node = before.get(name) ?? create(item);
    before.delete(name);
    after.set(name, node);
    update(node, item);
    if (parent.children[index] !== node) parent.insertBefore(node, parent.children[index] ?? null);
  });
  before.forEach(node => node.remove());
  nodesOf.set(parent, after);
}
