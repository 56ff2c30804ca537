/* evaluate/what_if.py in a page without a kernel; tests/browser/test_report.py holds them equal. */
(function(){
'use strict';
function kept(alpha,k){var sum=0,all=1;for(var i=0;i<k;i++){all*=alpha;sum+=all}return sum}
function predict(given,other){
  var g=Object.assign({},given,other),measured=g.verify;
  var widths=Object.keys(measured).map(Number).sort(function(a,b){return a-b});
  var widest=widths[widths.length-1];
  function at(k){return Math.max(0,g.step_ms+g.width*(measured[k]-measured[1]))}
  function verify(k){
    if(!(k>=widths[0]&&k<=widest))throw new Error('v('+k+') was not measured (K = '+widths[0]+' … '+
      widest+'); measure the verification curve up to that many rows');
    for(var i=0;widths[i]<k;i++);
    if(widths[i]===k)return at(k);
    return at(widths[i-1])+(at(widths[i])-at(widths[i-1]))*(k-widths[i-1])/(widths[i]-widths[i-1]);
  }
  var ahead=g.overlap*Math.max(0,g.verifier_prefill_ms-g.drafter_prefill_ms),free=0;
  if(g.overlap>0)free=Math.floor(g.draft_ms===0?Math.min(g.n_tokens,g.gamma):
    Math.min(g.n_tokens,widest,ahead/g.draft_ms+1e-9));
  var gained=free?Math.min(g.n_tokens,kept(g.hidden_acceptance,free)+1):1;
  var round=kept(g.acceptance,g.gamma)+1,rounds=(g.n_tokens-gained)/round;
  var late=Math.max(0,g.drafter_prefill_ms-g.verifier_prefill_ms);
  var parts={
    prefill:g.verifier_prefill_ms*(g.overlap>0?g.contention:1),
    exposed_drafter_prefill:(1-g.overlap)*g.drafter_prefill_ms+g.overlap*late,
    hidden_drafts:free?g.round_ms+verify(free):0,draft:rounds*g.gamma*g.draft_ms,
    align:g.gamma>0?rounds*g.round_ms:0,verify:rounds>0?rounds*verify(g.gamma+1):0};
  var total=Object.values(parts).reduce(function(a,b){return a+b},0);
  var baseline=g.verifier_prefill_ms+(g.n_tokens-1)*at(1);
  return {total_ms:total,baseline_ms:baseline,speedup:baseline/total,parts_ms:parts,n_free:free,
          n_rounds:rounds,tokens_per_round:round};
}
function whatIf(given){
  function ratio(name,value){var o={};o[name]=value;return predict(given,o).speedup}
  function reaches(alpha){return ratio('acceptance',alpha)>=1}
  var found=predict(given),shares=['acceptance','hidden_acceptance','overlap'];
  var widest=Math.min(Math.max.apply(null,Object.keys(given.verify).map(Number))-1,64);
  found.by_gamma=[];found.by_acceptance=[];found.sensitivity=[];found.best_gamma=null;
  for(var k=1,best=-1;k<=widest;k++){
    var now=ratio('gamma',k);
    found.by_gamma.push([k,now]);
    if(now>best){best=now;found.best_gamma=k}
  }
  for(var i=0;i<=20;i++)found.by_acceptance.push([i/20,ratio('acceptance',i/20)]);
  Object.keys(given).forEach(function(name){
    if(name==='verify'||name==='gamma')return;
    var low=name==='contention'||name==='n_tokens'?1:0,high=shares.indexOf(name)<0?1e9:1;
    function moved(by){return ratio(name,Math.min(high,Math.max(low,given[name]*by)))}
    found.sensitivity.push({input:name,less:moved(.9),more:moved(1.1)});
  });
  found.sensitivity.sort(function(a,b){return Math.abs(b.more-b.less)-Math.abs(a.more-a.less)});
  found.break_even=null;
  if(reaches(1)){
    var lo=0,hi=1;
    for(i=0;i<50;i++){var middle=(lo+hi)/2;if(reaches(middle))hi=middle;else lo=middle}
    found.break_even=reaches(0)?0:hi;
  }
  return found;
}
window.xsdWhatIf=whatIf;
var stored=document.getElementById('what-if-data'),app=document.getElementById('what-if-app');
if(!stored||!app)return;
var told=JSON.parse(stored.textContent),inputs=told.inputs,given,controls={};
function add(tag,into,text,about){
  var e=Object.assign(document.createElement(tag),about||{});
  if(text)e.textContent=text;
  into.appendChild(e);
  return e;
}
var label=add('label',app,'Start from '),start=add('select',label);
Object.keys(told.presets).forEach(function(name){add('option',start,name,{value:name})});
var fields=add('div',app,'',{className:'sliders'});
Object.keys(inputs).forEach(function(name){
  var one=add('label',fields),text=inputs[name];
  add('b',one,text[0]);
  add('span',one,text[1]);
  var range=add('input',one,'',{type:'range',min:told.ranges[name][0],max:told.ranges[name][1],
    step:name==='gamma'||name==='n_tokens'?'1':'any'});
  range.setAttribute('aria-label',text.filter(Boolean).join(', '));
  var shown=add('output',one);
  range.addEventListener('input',function(){given[name]=Number(range.value);show()});
  controls[name]={range:range,shown:shown,unit:text[2]};
});
var said=add('p',app);
said.setAttribute('aria-live','polite');
var panels=add('div',app,'',{className:'panels'}),plots=['by acceptance, α','by drafts a round, γ',
  'each input 10 % less (grey), more (green)'].map(function(title){
  var box=add('div',panels);
  add('div',box,title,{className:'figure-title'});
  var plot=add('div',box,'',{className:'plot small'});
  plot.setAttribute('role','img');
  plot.setAttribute('aria-label','speed-up '+title);
  return plot;
});
function columns(pairs){return {x:pairs.map(function(p){return p[0]}),
                                y:pairs.map(function(p){return p[1]})}}
function layout(x,y,more){
  return Object.assign({height:300,margin:{l:55,r:10,t:10,b:45},showlegend:false,hovermode:'closest',
    paper_bgcolor:'rgba(0,0,0,0)',plot_bgcolor:'rgba(0,0,0,0)',font:{size:13},
    xaxis:Object.assign({title:{text:x},automargin:true,gridcolor:'#E6E8EB',zeroline:false},more.x),
    yaxis:Object.assign({title:{text:y},automargin:true,gridcolor:'#E6E8EB',zeroline:false},more.y),
    shapes:more.line?[{type:'line',xref:'paper',x0:0,x1:1,y0:1,y1:1,
                       line:{dash:'dash',color:'#5F6368',width:1.5}}]:[]},more.all);
}
function show(){
  Object.keys(controls).forEach(function(name){
    var c=controls[name],value=given[name];
    c.range.value=value;
    c.shown.textContent=(name==='gamma'||name==='n_tokens'?Math.round(value):value.toFixed(2))+
      (c.unit?' '+c.unit:'');
  });
  try{var f=whatIf(given)}catch(error){said.textContent=error.message;return}
  said.textContent=f.speedup.toFixed(2)+'× plain decoding: '+f.total_ms.toFixed(0)+
    ' ms in place of '+f.baseline_ms.toFixed(0)+' ('+Object.keys(f.parts_ms).filter(function(p){
      return f.parts_ms[p]>=.5}).map(function(p){
      return p.replace(/_/g,' ')+' '+f.parts_ms[p].toFixed(0)}).join(', ')+'); '+
    f.tokens_per_round.toFixed(2)+' tokens a round; '+(f.break_even===null?
      'no acceptance reaches the baseline':'break-even at α = '+(100*f.break_even).toFixed(0)+' %')+
    (f.best_gamma===null?'':'; best γ '+f.best_gamma+' at '+
      f.by_gamma[f.best_gamma-1][1].toFixed(2)+'×')+
    (told.presets[start.value].measured?'. Measured in this run, where this started: '+
      told.presets[start.value].measured.toFixed(2)+'×':'')+'.';
  if(!window.Plotly)return;
  function curve(pairs){return Object.assign(columns(pairs),{mode:'lines',hovertemplate:
    '%{x:.2~f}: %{y:.2f}×<extra>predicted</extra>',line:{color:'#0072B2',width:2.5}})}
  function here(x){return {x:[x],y:[f.speedup],mode:'markers',hovertemplate:
    '%{y:.2f}×<extra>here</extra>',marker:{color:'#E07B00',size:11,symbol:'diamond'}}}
  var known=Object.keys(told.presets).filter(function(p){return told.presets[p].measured});
  var rings={x:known.map(function(p){return told.presets[p].given.acceptance}),
    y:known.map(function(p){return told.presets[p].measured}),
    text:known.map(function(p){return p.replace(/&/g,'&amp;').replace(/</g,'&lt;')}),mode:'markers',
    marker:{color:'#202124',size:9,symbol:'circle-open'},
    hovertemplate:'%{text}: %{y:.2f}×<extra>measured</extra>'};
  Plotly.react(plots[0],[curve(f.by_acceptance),rings,here(given.acceptance)],layout('α',
    'times as fast as plain decoding',{line:true,x:{range:[0,1.04]},y:{rangemode:'tozero'}}),
    told.config);
  Plotly.react(plots[1],[curve(f.by_gamma),here(given.gamma)],layout('drafts',
    'times as fast',{line:true,x:{rangemode:'tozero'}}),told.config);
  var rows=f.sensitivity.slice().reverse();
  Plotly.react(plots[2],['less','more'].map(function(side){return {type:'bar',orientation:'h',
    x:rows.map(function(r){return r[side]-f.speedup}),
    y:rows.map(function(r){return inputs[r.input][0]}),
    marker:{color:side==='less'?'#9AA0A6':'#009E73'},hovertemplate:'%{y} 10 % '+side+
    ': %{x:+.3f}×<extra></extra>'}}),layout('change of the speed-up, ×','',{all:{barmode:'overlay'}}),
    told.config);
}
function restart(){given=Object.assign({},told.presets[start.value].given);show()}
start.addEventListener('change',restart);
document.addEventListener('plotly',show);
restart();
})()
