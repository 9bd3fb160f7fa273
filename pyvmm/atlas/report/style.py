# SPDX-License-Identifier: Apache-2.0
"""The atlas page's own style, and its few lines of script.

The page works without the script, which opens the target of a link, folds all at once, and offers the data for
download. A verdict has a mark, a word and a kind of border, so no colour is needed.
"""

from __future__ import annotations

from pyvmm.reports import style

GAP = 0.55
"""Between the columns of two protections, in rem; ``.first`` has it too."""

CSS = (
    style.CSS
    + """\
:root{--holds:#0b5d86;--holds-bg:#dff0f8;--fails:#9a3700;--fails-bg:#ffe6d5;--untold:#59636e;--untold-bg:transparent;
--crashed:#fff;--crashed-bg:#6e2c78;--mark:#fff8c5}
@media (prefers-color-scheme:dark){:root{--holds:#8fd0f0;--holds-bg:#11384c;--fails:#ffb58a;--fails-bg:#54290f;
--untold:#a5afba;--crashed:#fff;--crashed-bg:#8b3f97;--mark:#3b3210}}
html{scroll-padding-top:4.5rem}
.filter{display:flex;flex-wrap:wrap;gap:.5rem;margin:1.2rem 0 .8rem;padding:0;border:0}
.filter legend{float:left;padding:.25rem .3rem 0 0;color:var(--soft)}
.filter label{position:relative;display:flex;align-items:center;gap:.45rem;padding:.2rem .7rem .2rem .25rem;
cursor:pointer;border:1px solid var(--line);border-radius:2rem;background:var(--panel)}
.filter label:first-of-type{padding-left:.7rem}
.filter input{position:absolute;opacity:0}
.filter label:has(:checked){border-color:var(--ink);box-shadow:inset 0 0 0 1px var(--ink)}
.filter label:has(:focus-visible){outline:2px solid var(--link);outline-offset:2px}
.v{display:inline-flex;align-items:center;justify-content:center;min-width:1.7em;height:1.7em;border-radius:.3rem;
font-weight:700;text-decoration:none;border:1.5px solid transparent}
.v.holds{color:var(--holds);background:var(--holds-bg);border-color:var(--holds-bg)}
.v.fails{color:var(--fails);background:var(--fails-bg);border-color:var(--fails)}
.v.untold{color:var(--untold);background:var(--untold-bg);border:1.5px dashed var(--untold)}
.v.crashed{color:var(--crashed);background:var(--crashed-bg);border:3px double var(--crashed)}
.filter .v{border-radius:1rem}
.toc .nil{color:var(--line)}
.tools{font-size:.85rem;color:var(--soft);display:flex;flex-wrap:wrap;gap:.2rem 1rem;align-items:center}
button{font:inherit;padding:0;border:0;background:none;color:var(--link);text-decoration:underline;cursor:pointer}
.reasons{margin:.4rem 0;font-size:.9rem}
.reasons>summary{cursor:pointer}
.reasons ul{margin:.2rem 0 .6rem;padding-left:1.6rem}
.reasons li{margin:.2rem 0}
.reasons small{color:var(--soft);display:block}
.group{margin:2.2rem 0 0}
.grid{display:grid;column-gap:2px;align-items:stretch}
.head{position:sticky;top:0;z-index:1;background:var(--page);border-bottom:1px solid var(--line);padding:.4rem 0 .3rem;
font-size:.72rem;line-height:1.15;color:var(--soft);align-items:end}
.head>*{padding:0 .1rem;text-align:center}
.head h2{text-align:left;grid-row:span 2;align-self:end;font-size:1.15rem;line-height:1.3;color:var(--ink)}
.head h2 small{display:block;margin:0}
.head b{font-size:.8rem;color:var(--ink);border-bottom:1px solid var(--line);margin-bottom:.15rem;padding-bottom:.1rem}
.first{margin-left:.55rem}
.claim{border-bottom:1px solid var(--line)}
.claim>summary{list-style:none;cursor:pointer;padding:.3rem 0}
summary::-webkit-details-marker{display:none}
.claim>summary:hover,.result>summary:hover{background:var(--panel)}
.what{position:relative;padding:.1rem .8rem .1rem 1.15rem;align-self:center}
.what::before,.result>summary::before{content:"";position:absolute;left:.25rem;top:.55em;
border:.3em solid transparent;border-left:.42em solid var(--soft);border-right:0}
details[open]>summary>.what::before,.result[open]>summary::before{transform:rotate(90deg)}
.what b{font-weight:600;margin-right:.35rem}
.what span{color:var(--soft)}
.grid>.v{flex-direction:column;height:auto;min-height:2.5rem;min-width:0;line-height:1.1}
.grid>.v small{font-weight:400;font-size:.68rem;line-height:1.2}
.grid>.v i{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
.grid>a.v:hover,.grid>a.v:focus-visible{outline:2px solid var(--ink);outline-offset:-1px}
.not{display:flex;align-items:center;justify-content:center;color:var(--line)}
.v.odd{box-shadow:inset 0 0 0 2px var(--fails)}
.body{padding:.2rem 0 1rem 1.15rem}
.origin{margin:.2rem 0 .8rem;padding:.1rem 0 .1rem .8rem;border-left:3px solid var(--line);color:var(--soft);
white-space:pre-line;max-width:60rem;font-size:.9rem}
.result{border:1px solid var(--line);border-radius:.4rem;margin:.4rem 0;background:var(--page)}
.result>summary{position:relative;display:flex;flex-wrap:wrap;align-items:center;gap:.15rem .7rem;list-style:none;
cursor:pointer;padding:.3rem 1.8rem .3rem 1.3rem;border-radius:.4rem}
.result>summary::before{left:.55rem;top:1.05em}
.result>summary .why{color:var(--soft);flex:1 1 20rem}
.result>summary>a{position:absolute;right:.6rem;top:.4rem;text-decoration:none;color:var(--soft)}
.result>div{padding:.2rem .8rem .8rem 1.3rem}
.result:target{outline:2px solid var(--link)}
.result:target>summary,.claim:target>summary{background:var(--mark)}
.because{margin:.2rem 0 .6rem;white-space:pre-wrap}
.evidence{display:block;overflow-x:auto;overflow-wrap:break-word;margin:.2rem 0 .6rem}
.evidence th{font-weight:400;text-align:left;color:var(--soft);padding:.1rem 1.2rem .1rem 0;font-size:.8rem}
.evidence td{vertical-align:top;padding:.15rem 1.2rem .15rem 0;border-top:1px solid var(--line)}
.evidence td.value{white-space:pre-wrap}
.evidence td:first-child{width:1.6rem;padding-right:.6rem;font-weight:700}
.evidence .no td{background:var(--fails-bg)}
.evidence .no td:first-child{color:var(--fails);padding-left:.3rem}
.evidence .ok td:last-child{color:var(--soft)}
.evidence .ok td:first-child{color:var(--holds)}
.times{margin:.2rem 0 .6rem;color:var(--soft);font-size:.88rem}
.times b{font-weight:600;color:var(--ink);font-variant-numeric:tabular-nums}
figure{margin:.4rem 0 .6rem;overflow-x:auto}
figure svg{max-width:100%;height:auto;border-radius:.3rem}
@media print{.filter,.tools,.result>summary>a{display:none}
.head{position:static}.claim,.result{break-inside:avoid}
.v.holds{border-color:#999}.v.fails{border-width:2.5px}}
"""
)
"""The style sheet. :func:`columns` and :func:`filters` add the rules that depend on the number of columns."""

SCRIPT = """"use strict";
(function(){
var all=document.querySelectorAll.bind(document);
function open(){
var e=location.hash.length>1&&document.getElementById(location.hash.slice(1));
if(!e)return;
for(var d=e;d;d=d.parentElement)if(d.tagName==="DETAILS")d.open=true;
var c=e.closest(".claim");
(c&&e.getBoundingClientRect().top-c.getBoundingClientRect().top<innerHeight/2?c:e).scrollIntoView();
}
function fold(to){return function(){all("details.claim,details.result").forEach(function(d){d.open=to})}}
addEventListener("hashchange",open);
document.addEventListener("click",function(e){
var a=e.target.closest&&e.target.closest("a");
if(a&&a.hash&&a.hash===location.hash){e.preventDefault();open()}
});
all(".js").forEach(function(e){e.classList.remove("js")});
document.getElementById("_unfold").onclick=fold(true);
document.getElementById("_fold").onclick=fold(false);
document.getElementById("_data").onclick=function(){
this.href=URL.createObjectURL(new Blob([document.getElementById("_json").textContent],{type:"application/json"}));
};
open();
})();
"""


_NARROW = """
.grid{display:flex;flex-wrap:wrap;gap:.3rem}
.grid>.what{flex:1 0 calc(100% + 1.15rem)}
.head{padding:.4rem 0}
.head>:not(h2),.not{display:none}
.first{margin-left:0}
.grid>.v{flex-direction:row;gap:.3rem;min-height:0;padding:.15rem .45rem}
.grid>.v i{position:static;width:auto;height:auto;clip-path:none;font:inherit;font-size:.78rem;font-weight:500}
.grid>.v small{display:none}
.body{padding-left:.2rem}
.claim>summary{padding:.5rem 0 .5rem 1.15rem}
.claim>summary>.what{margin-left:-1.15rem}
.result>div{padding-left:.6rem}
figure svg{max-width:none}
"""


def columns(sizes: list[int]) -> str:
    """Return the style of a table with ``sizes`` columns in each protection: a line of cells, or wrapped cells."""
    width = 3.7 if sum(sizes) <= 8 else 3.3
    template = " ".join(f"{width + GAP:g}rem" + f" {width:g}rem" * (size - 1) for size in sizes)
    narrow = 22 + sum(size * width + GAP for size in sizes)
    return f".grid{{grid-template-columns:minmax(15rem,1fr) {template}}}@media (max-width:{narrow:g}rem){{{_NARROW}}}"


def filters(names: list[str]) -> str:
    """Return the style that shows only claims with the verdict of the active radio button, one of ``names``."""
    return "".join(
        f"body:has(#_only-{name}:checked) :is(.claim:not(.has-{name}),.group:not(:has(.has-{name}))){{display:none}}"
        for name in names
    )
