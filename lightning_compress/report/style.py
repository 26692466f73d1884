"""The look of the page: one style sheet, light and dark, no fonts or files from elsewhere."""

__all__ = ["STYLE"]

STYLE = """
:root {
  color-scheme: light dark;
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
  --page: #fbfaf8; --card: #ffffff; --ink: #1d2328; --muted: #66707a; --grid: #e3e2de; --edge: #e6e4df;
  --accent: #2f6fde; --second: #d9730d; --third: #2a9d74; --fourth: #9a4fc4; --fifth: #c23a5c;
  --good: #1d7f58; --warn-page: #fff6e5; --warn-edge: #e8b04b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --card: #1c2024; --ink: #e8eaec; --muted: #9aa4ad; --grid: #30363c; --edge: #2c3238;
    --accent: #6ea2ff; --second: #f2a154; --third: #5cc9a0; --fourth: #c58ee6; --fifth: #ef7f9a;
    --good: #62cfa0; --warn-page: #2b2414; --warn-edge: #8a6a26;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 var(--font); }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.8rem; line-height: 1.2; letter-spacing: -0.01em; margin: 0 0 .35rem; text-wrap: balance; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .25rem; }
p { margin: .25rem 0 .9rem; max-width: 46rem; }
.lead, .note, figcaption, caption { color: var(--muted); }
.note, figcaption, caption { font-size: .875rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .7rem;
  margin: 1.6rem 0 .5rem; padding: 0; }
.tile { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; padding: .8rem .95rem; }
.tile dt { color: var(--muted); font-size: .8rem; white-space: nowrap; }
.tile dd { margin: 0; }
.tile .value { font-size: 1.7rem; font-weight: 650; line-height: 1.25; letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; }
.tile .detail { color: var(--muted); font-size: .82rem; }
figure { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; margin: .8rem 0 0;
  padding: 1rem; }
figure { overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 34rem; height: auto; }
figcaption { margin-top: .5rem; }
.scroll { overflow-x: auto; margin-top: .6rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }
caption { caption-side: bottom; text-align: left; padding-top: .5rem; }
th, td { padding: .42rem .7rem; text-align: right; border-bottom: 1px solid var(--edge); white-space: nowrap }
th { font-weight: 600; color: var(--muted); }
th[scope=row], th.text, td.text { text-align: left; }
th[scope=row] { color: var(--ink); font-weight: 500; }
tr.first td, tr.first th { border-top: 2px solid var(--grid); }
.warnings { background: var(--warn-page); border: 1px solid var(--warn-edge); border-radius: 10px;
  margin: 1.4rem 0 0; padding: .8rem 1.1rem; }
.warnings ul { margin: .2rem 0 0; padding-left: 1.2rem; }
details { margin-top: .8rem; border-top: 1px solid var(--edge); padding-top: .7rem; }
summary { cursor: pointer; color: var(--muted); }
code, pre { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .86em; }
pre { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: .8rem 1rem;
  overflow-x: auto; }
.texts { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; margin: .8rem 0 0;
  padding: .9rem 1.1rem 1rem; }
.texts article { border-top: 1px solid var(--edge); padding: .7rem 0 .8rem; }
.texts article:last-child { padding-bottom: 0; }
.texts details { margin-top: 0; }
.texts p { max-width: none; margin: 0; }
.verdict, .legend { color: var(--muted); font-size: .82rem; }
.verdict b { color: var(--ink); font-weight: 600; }
.texts .legend { margin-bottom: .7rem; }
.legend span:first-child { margin-right: .5rem; }
.tokens { line-height: 1.85; margin-top: .3rem; overflow-wrap: anywhere; }
.tokens small { font-size: .72em; letter-spacing: .02em; }
.tokens span { padding: .14em .05em; border-radius: 3px; }
.legend span[title] { display: inline-block; min-width: 1.8em; border-radius: 3px; text-align: center; }
.texts .s0, .texts .s1, .texts .s2 { color: var(--muted); }
.texts .s1 { background: color-mix(in srgb, var(--accent) 5%, transparent); }
.texts .s2 { background: color-mix(in srgb, var(--accent) 8%, transparent); }
.texts .s3 { background: color-mix(in srgb, var(--accent) 14%, transparent); }
.texts .s4 { background: color-mix(in srgb, var(--accent) 20%, transparent); }
.texts .s5 { background: color-mix(in srgb, var(--accent) 27%, transparent); }
.texts .s6 { background: color-mix(in srgb, var(--accent) 40%, transparent); }
.texts .s3, .texts .s4, .texts .s5, .texts .s6 { color: var(--ink); }
.texts .s6 { font-weight: 600; }
footer { margin-top: 3rem; color: var(--muted); font-size: .85rem; }
@media print { figure, .tile { break-inside: avoid; } }
"""
