// Sets every formula that pymdownx.arithmatex marked, with the KaTeX 0.19.1 beside this file.
// katex/ holds the dist/ files of the npm package katex (MIT, see katex/LICENSE) that this site needs: the script, the
// style sheet without its ttf and woff sources and without the faces that no formula uses, and the woff2 fonts it names.
for (const element of document.querySelectorAll(".arithmatex")) {
  const text = element.textContent.trim();
  katex.render(text.slice(2, -2), element, {
    displayMode: text.startsWith("\\["),
    throwOnError: false,
  });
}
