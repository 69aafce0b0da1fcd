// Sets every formula that pymdownx.arithmatex marked, with the KaTeX 0.19.1 beside this file.
// katex/ holds the dist/ files of the npm package katex (MIT, see katex/LICENSE) that this site needs: the script, the
// style sheet without its ttf and woff sources and without the faces that no formula uses, and the woff2 fonts it names.
for (const element of document.querySelectorAll(".arithmatex")) {
  const text = element.textContent.trim();
  const displayMode = text.startsWith("\\[");
  katex.render(text.slice(2, -2), element, { displayMode, throwOnError: false });
  if (!displayMode) keepTogether(element);
}

// A line may not break between a formula and the bracket before it or the punctuation after it.
function keepTogether(element) {
  const { previousSibling: before, nextSibling: after } = element;
  const opening = before?.nodeType === Node.TEXT_NODE ? before.data.match(/\(+$/)?.[0] ?? "" : "";
  const closing = after?.nodeType === Node.TEXT_NODE ? after.data.match(/^[).,:;]+/)?.[0] ?? "" : "";
  if (!opening && !closing) return;
  const whole = document.createElement("span");
  whole.style.whiteSpace = "nowrap";
  element.replaceWith(whole);
  whole.append(opening, element, closing);
  if (opening) before.data = before.data.slice(0, -opening.length);
  if (closing) after.data = after.data.slice(closing.length);
}
