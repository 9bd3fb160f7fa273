# SPDX-License-Identifier: Apache-2.0
"""The style sheet of all HTML reports: light and dark colours, headings, facts, contents, the stripe.

A report appends its own rules. No information is shown by colour alone: a word or a mark repeats it.
"""

from __future__ import annotations

from typing import Final

CSS: Final = """
:root{color-scheme:light dark;--page:#fff;--ink:#1b1f24;--soft:#59636e;--line:#d5dae0;--panel:#f6f8fa;--link:#0550ae;
--stripe-a:#fff3c4;--stripe-b:#ffe48a;--stripe-ink:#4d3800}
@media (prefers-color-scheme:dark){:root{--page:#0f1318;--ink:#e3e8ee;--soft:#9aa5b1;--line:#30373f;--panel:#171c23;
--link:#7ab7ff;--stripe-a:#4a3b0a;--stripe-b:#3a2e06;--stripe-ink:#ffe48a}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.2rem clamp(.7rem,2.5vw,2rem) 4rem;max-width:88rem;background:var(--page);color:var(--ink);
font:.95rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif;
overflow-wrap:anywhere}
a{color:var(--link)}
code,.mono,td.value{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.92em}
h1{font-size:1.55rem;line-height:1.25;margin:.1rem 0 .6rem}
h2{font-size:1.15rem;margin:0}
h2 a{color:inherit;text-decoration:none}
h2 a:hover{text-decoration:underline}
h2 small{font-weight:400;color:var(--soft);margin-left:.5rem;font-size:.9rem}
.kicker{margin:0;color:var(--soft);letter-spacing:.04em;font-size:.85rem}
.stripe{margin:.6rem 0;padding:.45rem .8rem;border-radius:.3rem;color:var(--stripe-ink);font-weight:600;
background:repeating-linear-gradient(-45deg,var(--stripe-a) 0 1rem,var(--stripe-b) 1rem 2rem)}
.facts{display:grid;grid-template-columns:fit-content(11rem) minmax(0,1fr);gap:.1rem 1rem;margin:.6rem 0;
font-size:.9rem}
.facts dt{color:var(--soft)}
.facts dd{margin:0}
table{border-collapse:collapse;font-size:.9rem}
.top{display:flex;flex-wrap:wrap;gap:.6rem 3.5rem;align-items:flex-start}
.top .facts{flex:1 1 24rem;max-width:46rem}
.toc{margin:.2rem 0 .6rem}
.toc th{text-align:left;font-weight:400;padding:.1rem 1rem .1rem 0;color:var(--soft)}
.toc td{text-align:right;padding:.1rem .45rem;font-variant-numeric:tabular-nums;min-width:2.7rem}
.toc thead th{text-align:right;padding-right:.45rem}
footer{margin-top:3rem;padding-top:.8rem;border-top:1px solid var(--line);color:var(--soft);font-size:.85rem}
.js{display:none}
@media print{body{max-width:none;padding:0;font-size:9pt}a{color:inherit}
.stripe{border:2px dashed;background:none;color:#000}}
"""
