"""What the page of a bench report looks like (page.py): one sheet, light or dark, that fits a telephone."""

from __future__ import annotations

from typing import Final

STYLE: Final = """
:root { color-scheme: light dark; --page: #fbfbfd; --card: #fff; --text: #1c2130; --soft: #5d6779; --lines: #d9dde5;
        --accent: #b85c00; }
@media (prefers-color-scheme: dark) {
  :root { --page: #11141b; --card: #191d27; --text: #e4e8f1; --soft: #9ba5b9; --lines: #353c4c; --accent: #ffa826; } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 66rem; background: var(--page); color: var(--text);
       font: 15px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; overflow-wrap: anywhere }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.25; letter-spacing: -.01em } h2 { margin: 2.8rem 0 .3rem; font-size: 1.15rem }
p { margin: .35rem 0 .8rem; color: var(--soft); max-width: 52rem } p.setting { font-size: 1.05rem; color: var(--text) }
dl { display: grid; grid-template-columns: minmax(8rem, 18rem) 1fr; gap: .3rem 1.2rem; margin: .6rem 0 }
dt { font-weight: 600 } dd { margin: 0; color: var(--soft) }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .8rem; margin-top: 1.6rem }
.card, figure, .table { background: var(--card); border: 1px solid var(--lines); border-radius: .7rem }
.card { padding: .9rem 1.1rem; overflow-wrap: normal } .card b { display: block; white-space: nowrap; font-size: 1.45rem;
        line-height: 1.25; color: var(--accent); font-variant-numeric: tabular-nums } .card span { color: var(--soft);
        font-size: .85rem }
figure { margin: 0; padding: 1rem; overflow-x: auto } svg { display: block; width: 100%; min-width: 40rem; height: auto }
.table { overflow-x: auto; overflow-wrap: normal } table { border-collapse: collapse; width: 100%; font-size: .82rem;
         font-variant-numeric: tabular-nums }
th, td { padding: .5rem .6rem; text-align: right; border-bottom: 1px solid var(--lines); vertical-align: top }
tr:last-child td { border-bottom: 0 } th { color: var(--soft); font-weight: 500; min-width: 4.2rem }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--card); min-width: 8.5rem }
.table + p { margin-top: 1.6rem }
td small { display: block; color: var(--soft); font-weight: 400 } td.failed { text-align: left; color: var(--soft) }
tr.ours td:first-child { color: var(--accent); font-weight: 600 }
@media (max-width: 36rem) { dl { grid-template-columns: 1fr; gap: 0 } dd { margin-bottom: .7rem } }
"""
