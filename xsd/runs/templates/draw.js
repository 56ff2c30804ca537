(function(){
'use strict';
var config=CONFIG, clear={paper_bgcolor:'rgba(0,0,0,0)',plot_bgcolor:'rgba(0,0,0,0)'};
function figure(e){
  var at=document.getElementById(e.dataset.at);
  if(e.dataset.drawn||!at||at.closest('details:not([open])'))return;
  e.dataset.drawn='yes';
  var f=JSON.parse(e.textContent);
  Plotly.newPlot(at,f.data,Object.assign({},f.layout,clear),config)
    .then(function(){if(f.frames)Plotly.addFrames(at,f.frames)});
}
function draw(){document.querySelectorAll('script.figure').forEach(figure)}
function library(then){
  var packed=document.getElementById('plotly'),s=document.createElement('script');
  if(window.Plotly&&Plotly.newPlot)return then();
  if(!packed){s.src='plotly.min.js';s.onload=then;document.body.appendChild(s);return}
  var bytes=Uint8Array.from(atob(packed.textContent),function(c){return c.charCodeAt(0)});
  new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'))).text()
    .then(function(text){s.textContent=text;document.body.appendChild(s);then()});
}
function reveal(){ /* what a link leads to may stand in a closed part */
  var at=document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for(var d=at&&at.closest('details');d;d=d.parentElement.closest('details'))d.open=true;
  if(at&&location.hash)at.scrollIntoView();
}
document.querySelectorAll('[data-key]').forEach(function(e){e.title=e.dataset.key});
window.addEventListener('hashchange',reveal);
reveal();
var kept=document.getElementById('results-json'),link=document.getElementById('results-file');
if(kept&&link)link.href=URL.createObjectURL(new Blob([kept.textContent],{type:'application/json'}));
if(document.querySelector('script.figure, #what-if-data'))library(function(){
  draw();
  document.addEventListener('toggle',draw,true);
  document.dispatchEvent(new Event('plotly'));
});
})()
