# SPDX-License-Identifier: Apache-2.0
"""The style of the HTML report: the atlas' style, rules for figures and tables of numbers, and a short script.

The page can be read without the script, which only offers the data for download.
"""

from __future__ import annotations

from typing import Final

from pyvmm.bench.report.plot import COLOURS
from pyvmm.reports import style

_DARK: Final = ("#5ab4f0", "#ff8b4a", "#3fc79a", "#e08fd0", "#e0b040", "#a3a3f0")


def _variables(colours: tuple[str, ...]) -> str:
    return ";".join(f"--c{at}:{colour}" for at, colour in enumerate(colours))


CSS: Final = (
    f"""{style.CSS}
:root{{{_variables(COLOURS)}}}
@media (prefers-color-scheme:dark){{:root{{{_variables(_DARK)}}}}}
"""
    + """
html{scroll-padding-top:1rem}
section{margin:2.4rem 0 0;border-top:1px solid var(--line);padding-top:1rem}
h3{font-size:1rem;margin:1.4rem 0 .1rem}
h3 small{font-weight:400;color:var(--soft);margin-left:.4rem;font-size:.88rem}
.at{margin:.1rem 0 .4rem;color:var(--soft);font-size:.88rem}
.relative{color:var(--stripe-ink);background:var(--stripe-a);border-radius:.25rem;padding:.05rem .4rem;font-size:.8rem;
font-weight:600;white-space:nowrap;margin-left:.4rem}
.wide{overflow-x:auto}
.numbers{font-variant-numeric:tabular-nums;overflow-wrap:normal}
.numbers th,.numbers td{padding:.12rem .7rem .12rem 0;text-align:right;white-space:nowrap;vertical-align:baseline}
.numbers th{font-weight:400;color:var(--soft);font-size:.82rem}
.numbers tbody td{border-top:1px solid var(--line)}
.numbers .name{text-align:left}
.numbers tbody tr:hover{background:var(--panel)}
.numbers b{font-weight:600}
.figures{columns:2 36rem;column-gap:1.6rem;margin:1.2rem 0}
figure{margin:0 0 1.2rem;break-inside:avoid}
figure svg{display:block;width:100%;max-width:54rem}
figcaption{color:var(--soft);font-size:.82rem;padding:0 .3rem}
.missing{margin:.8rem 0;padding:.1rem 0 .1rem .8rem;border-left:3px solid var(--stripe-b);font-size:.9rem}
.missing small{display:block;color:var(--soft)}
.howto{font-size:.9rem}
.howto summary{cursor:pointer}
.howto dl{margin:.4rem 0}
@media (max-width:40rem){figure{overflow-x:auto}figure svg{width:38rem;max-width:none}
.facts{grid-template-columns:minmax(0,1fr)}.facts dd{margin-bottom:.3rem}}
@media print{.wide{overflow:visible}}
"""
)
"""The style sheet; ``--c0`` and further are the figures' colours."""

SCRIPT: Final = """"use strict";
(function(){
var link=document.getElementById("_download"),ready=false;
function lines(){
var data=JSON.parse(document.getElementById("_data").textContent);
if(data.encoding==="plain")return Promise.resolve(data.lines);
var packed=Uint8Array.from(atob(data.lines),function(c){return c.charCodeAt(0)});
return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"))).text();
}
link.onclick=function(e){
if(ready)return;
e.preventDefault();
Promise.resolve().then(lines).then(function(text){
link.href=URL.createObjectURL(new Blob([text],{type:"application/x-ndjson"}));
ready=true;
link.click();
}).catch(function(){link.textContent="This browser cannot unpack the results"});
};
document.querySelectorAll(".js").forEach(function(e){e.classList.remove("js")});
})();
"""
