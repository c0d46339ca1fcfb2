// Small words for the page's elements, and what every part of it needs.

/** What a person is told in one line; any other error is a defect of ours. */
class Refusal extends Error {}

const byId = (id) => document.getElementById(id);

/** Makes an element: `make("li", {className: "pane"}, "text", child)`. */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const percent = (share) => (share >= 0.9995 ? "100 %" : `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`);

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

/** Gives the browser time to draw and to hear the person. */
const breathe = () => new Promise((resolve) => setTimeout(resolve));

const wantsStillness = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

/** One line for a person, of whatever was thrown. */
function lineOf(error) {
  if (!(error instanceof Refusal)) console.error(error);
  return String(error.message || error).split("\n")[0];
}
