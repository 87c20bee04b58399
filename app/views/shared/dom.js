// For every view: finding, making and updating elements. Texts are only ever set as text, never as HTML.
const $ = (selector) => element.querySelector(selector);

// An element with properties and children: make("button", { type: "button" }, "Cancel").
function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// Sets a text only if it has changed, so that screen readers and selections are left alone.
function put(target, text) {
  const node = typeof target === "string" ? $(target) : target;
  if (node.textContent !== text) node.textContent = text;
}
