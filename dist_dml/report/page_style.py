"""How a report looks: on a wide screen, on a telephone, on paper, by day and by night."""

from __future__ import annotations

STYLE = """
:root {
  --paper: #ffffff; --ink: #1d1f23; --soft: #5b626d; --line: #dfe3e8; --panel: #f6f7f9;
  --link: #0b5cad; --hit: #1a7f3c; --miss: #c41f33; --best: #e4f3e8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #121417; --ink: #e6e8eb; --soft: #a2a9b4; --line: #30353c; --panel: #1b1f24;
    --link: #79b8ff; --hit: #57c77a; --miss: #ff7b86; --best: #1d3526;
  }
  /* Figures are drawn on white: turned over, and their hues turned back. */
  img.figure { filter: invert(0.93) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 0 1.25rem 4rem; max-width: 84rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: anywhere;
}
header { padding: 2.2rem 0 1rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 0.6rem; letter-spacing: -0.01em; }
h2 {
  font-size: 1.3rem; margin: 0 0 0.8rem; padding-top: 1.6rem; border-top: 1px solid var(--line);
}
h3 { font-size: 1.02rem; margin: 1.6rem 0 0.6rem; }
p { margin: 0 0 0.8rem; max-width: 46rem; }
a { color: var(--link); }
.note, caption, figcaption, small { color: var(--soft); font-size: 0.85rem; }
.empty { color: var(--soft); font-style: italic; }
nav ul { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: 0.35rem; }
nav a {
  display: block; padding: 0.2rem 0.7rem; border: 1px solid var(--line); border-radius: 1rem;
  font-size: 0.88rem; text-decoration: none; background: var(--panel);
}
nav a:hover, nav a:focus { border-color: var(--link); }
main { margin-top: 1.8rem; }
section { margin-bottom: 1.6rem; }
.headlines { display: flex; flex-wrap: wrap; gap: 0.8rem; margin: 1rem 0; }
.headline {
  border: 1px solid var(--line); background: var(--panel); border-radius: 0.6rem;
  padding: 0.6rem 1rem; min-width: 8.5rem;
}
.headline b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.headline span { color: var(--soft); font-size: 0.82rem; }
.wide { overflow-x: auto; margin: 0 0 1rem; }
table { border-collapse: collapse; font-size: 0.86rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 0 0 0.4rem; caption-side: top; }
th, td {
  padding: 0.35rem 0.5rem; text-align: right; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: normal; white-space: nowrap;
}
th { font-weight: 600; }
thead th { color: var(--soft); font-size: 0.82rem; vertical-align: bottom; }
th.word, td.word { text-align: left; }
td.word { white-space: normal; min-width: 9rem; max-width: 34rem; overflow-wrap: anywhere; }
tbody th.word { white-space: normal; min-width: 5.5rem; max-width: 22rem; overflow-wrap: anywhere; }
td small { display: block; white-space: nowrap; }
.best { background: var(--best); border-radius: 0.25rem; padding: 0.05rem 0.25rem; }
img.figure { display: block; max-width: 100%; height: auto; }
.figures { display: flex; flex-wrap: wrap; gap: 1.2rem; align-items: flex-start; }
.figures > figure { flex: 0 1 auto; }
figure { margin: 0 0 0.8rem; min-width: 0; max-width: 100%; }
.row {
  display: flex; flex-wrap: wrap; gap: 0.55rem; padding: 0.7rem 0; align-items: flex-start;
  border-bottom: 1px solid var(--line);
}
.row figure { width: 6.1rem; margin: 0; }
.row figure.query { margin-right: 0.9rem; }
.row img {
  display: block; width: 6.1rem; height: 6.1rem; object-fit: contain; background: var(--panel);
  border: 1.5px solid var(--soft); border-radius: 0.3rem; image-rendering: auto;
}
.row img.hit { border: 4px solid var(--hit); }
.row img.miss { border: 2px dashed var(--miss); }
.row figcaption {
  font-size: 0.72rem; line-height: 1.25; padding-top: 0.2rem; max-height: 5.2em; overflow: hidden;
}
.row figcaption span { display: block; }
.hit-word { color: var(--hit); font-weight: 600; }
.miss-word { color: var(--miss); font-weight: 600; }
.pairs {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 0.2rem 1.6rem;
}
.pairs .row { flex-wrap: nowrap; }
.pairs .row img { width: 4.4rem; height: 4.4rem; }
.pairs .row figure { width: 4.4rem; flex: none; }
.pairs .row > p { font-size: 0.85rem; margin: 0; min-width: 0; }
code { font: 0.85em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media (max-width: 34rem) {
  body { padding: 0 0.9rem 3rem; font-size: 15px; }
  h1 { font-size: 1.5rem; }
  .row figure, .row img { width: 4.7rem; }
  .row img { height: 4.7rem; }
  .headline { min-width: 0; flex: 1 1 7rem; }
  img.broad { max-width: none; width: 46rem; }
}
@media print {
  :root {
    --paper: #ffffff; --ink: #000000; --soft: #444444; --line: #bbbbbb; --panel: #ffffff;
    --link: #000000; --hit: #1a7f3c; --miss: #c41f33; --best: #e4f3e8;
  }
  body { max-width: none; padding: 0; font-size: 10pt; print-color-adjust: exact; }
  img.figure { filter: none; }
  nav { display: none; }
  .wide { overflow: visible; }
  th, td { padding: 0.15rem 0.35rem; white-space: normal; }
  h2 { break-after: avoid; }
  figure, .row, tr, .headline { break-inside: avoid; }
}
"""
"""The style sheet of every page; it names no address and no file."""
