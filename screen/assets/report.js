"use strict";
// Draws the curves of report.html from the columns that Run.curves in screen/report.py made.
const runs = JSON.parse(document.getElementById("data").textContent);
const [smoothing, decay, axis, log] = ["smoothing", "decay", "axis", "log"].map(id => document.getElementById(id));
const COLORS = [ // one per run, for both themes
  "#3b82f6", "#ef8a1f", "#12a594", "#d6409f", "#8e6bea", "#a3832f", "#e5484d", "#64923f"];
const DECAYS = [0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999]; // positions of the slider
const DASHES = [[], [5, 4], [2, 3], [8, 3, 2, 3]]; // of the sources or sets of several runs
const FREE = ["loss", "sources", "val_sets", "forgetting"]; // charts whose y-axis need not begin at 0
const BIG = new Intl.NumberFormat("en", {notation: "compact", maximumFractionDigits: 2});
const charts = {};

function text(value) {
  if (value == null) return "–";
  const size = Math.abs(value);
  if (size >= 1e5) return BIG.format(value);
  return size && size < 1e-4 ? value.toExponential(2).replace(/\.?0*e/, "e") : String(Number(value.toPrecision(4)));
}

// Debiased exponential mean over all steps: a point also counts the dropped steps that it represents.
function smooth({loss, mean, weight}, kept) {
  let sum = 0, total = 0;
  return loss.map((value, i) => {
    if (mean[i] == null) return null;
    const old = kept ** weight[i];
    sum = old * sum + (1 - old) * mean[i];
    total = old * total + (1 - old);
    return sum / total;
  });
}

// The x-axis: [its name, what its column is divided by].
function abscissa() {
  const longest = Math.max(0, ...runs.map(run => run.train.seconds.at(-1) ?? 0));
  return axis.value != "seconds" || longest < 300 ? [axis.value, 1] : longest < 2e4 ? ["minutes", 60] : ["hours", 3600];
}

// The curves of a chart: pairs of uPlot's options and the columns [x, y].
function lines(name) {
  const alone = runs.length == 1, [, length] = abscissa(), over = columns => columns[axis.value].map(x => x / length);
  return runs.flatMap(({name: run, train, val, sources}, i) => {
    const stroke = COLORS[i % COLORS.length], x = over(train);
    const mark = {stroke: alone ? COLORS[1] : stroke, width: 1.5, dash: alone ? [] : [5, 4]};
    const dots = color => ({points: {show: true, size: 6, fill: color}}), percent = ys => ys.map(y => y && 100 * y);
    // one line for each source or set: in the color of its place, or, of several runs, of the run
    const each = (named, columns) => Object.entries(named).map(([of, ys], k) => {
      const color = alone ? COLORS[k % COLORS.length] : stroke;
      return [{label: alone ? of : `${run}, ${of}`, stroke: color, width: 1.5, dash: alone ? [] : DASHES[k % 4],
               spanGaps: true, ...(name == "sources" ? {} : dots(color))}, [columns, ys]];
    });
    const ofSets = key => Object.fromEntries(Object.entries(val.sets).map(([of, set]) => [of, set[key]]));
    if (name == "sources") return each(Object.fromEntries(Object.entries(sources).map(([of, {mean, weight}]) =>
      [of, smooth({loss: mean, mean, weight}, DECAYS[smoothing.value])])), x);
    if (name == "val_sets") return each(ofSets("loss"), over(val));
    if (name == "forgetting") return each({...ofSets("forgetting"), all: val.forgetting}, over(val));
    if (name == "accuracy") return [
      [{label: alone ? name : run, stroke, width: 1.5}, [x, percent(train.accuracy)]],
      [{label: alone ? "validation" : `${run}, val`, ...mark, ...dots(mark.stroke)}, [over(val), percent(val.val_accuracy)]]];
    if (name != "loss") return [[{label: alone ? name : run, stroke, width: 1.5},
                                 [x, name == "mfu" ? percent(train.mfu) : train[name]]]];
    return [[{label: "each step", stroke: stroke + "60", width: 1, class: "raw"}, [x, train.loss]],
            [{label: alone ? "loss" : run, stroke, width: 2}, [x, smooth(train, DECAYS[smoothing.value])]],
            [{label: alone ? "val_loss" : `${run}, val`, ...mark, ...dots(mark.stroke)},
             [over(val), val.val_loss]]];
  }).filter(([, [x]]) => x.length);
}

const joined = curves => curves.length ? uPlot.join(curves.map(([, columns]) => columns)) : [[]];

// A dotted vertical line where a run was resumed.
function markResumes(u) {
  const [, length] = abscissa(), {left, top, width, height} = u.bbox;
  runs.forEach(({resumes}, i) => resumes[axis.value].forEach(place => {
    const x = u.valToPos(place / length, "x", true);
    if (x < left || x > left + width) return;
    u.ctx.save();
    u.ctx.strokeStyle = runs.length == 1 ? getComputedStyle(document.body).color : COLORS[i % COLORS.length];
    u.ctx.setLineDash([2 * devicePixelRatio, 4 * devicePixelRatio]);
    u.ctx.lineWidth = devicePixelRatio;
    u.ctx.beginPath();
    u.ctx.moveTo(x, top);
    u.ctx.lineTo(x, top + height);
    u.ctx.stroke();
    u.ctx.restore();
  }));
}

const fromZero = (u, low, high) => [0, high * 1.08 || 1];

function draw() {
  const style = getComputedStyle(document.documentElement), color = name => style.getPropertyValue(name);
  const line = {stroke: color("--line"), width: 1}, look = {stroke: color("--muted"), grid: line, ticks: line};
  for (const box of document.querySelectorAll("[data-curve]")) {
    const name = box.dataset.curve, curves = lines(name);
    const isLog = log.checked && ["loss", "sources", "val_sets", "grad_norm"].includes(name);
    charts[name]?.destroy();
    charts[name] = new uPlot({
      width: box.clientWidth, height: name == "loss" ? 330 : 200,
      cursor: {sync: {key: "report"}},
      scales: {x: {time: false}, y: isLog ? {distr: 3} : FREE.includes(name) ? {} : {range: fromZero}},
      hooks: {draw: [markResumes]},
      axes: [{...look, size: 36, values: (u, marks) => marks.map(text)},
             {...look, size: 56, values: (u, marks) => marks.map(mark => mark == null ? "" : text(mark))}],
      series: [{label: abscissa()[0], value: (u, value) => text(value)},
               ...curves.map(([options]) => ({...options, value: (u, value) => text(value)}))],
    }, joined(curves), box);
  }
}

function smoothen() {
  decay.value = DECAYS[smoothing.value];
  for (const name of ["loss", "sources"]) {
    charts[name]?.setData(joined(lines(name)), false); // false: keep the zoom
    charts[name]?.redraw();
  }
}

document.querySelectorAll("table, .runs").forEach(list => list.querySelectorAll(".swatch").forEach((swatch, i) => {
  swatch.style.background = COLORS[i % COLORS.length];
}));
smoothing.max = DECAYS.length - 1;
const most = Math.max(...runs.map(run => run.lines));
// Initial smoothing that removes noise but keeps the shape: 0.8 for 200 steps, 0.9 for 1,000, 0.99 for 50,000.
smoothing.value = Math.max(0, DECAYS.findLastIndex(kept => 2 / (1 - kept) <= Math.sqrt(most)));
smoothing.oninput = smoothen;
axis.onchange = log.onchange = draw;
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
window.onresize = () => Object.values(charts).forEach(({root, height, setSize}) => {
  setSize({width: root.parentNode.clientWidth, height});
});
smoothen();
draw();
