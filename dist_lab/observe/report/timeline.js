"use strict";
// The timeline: a canvas that shows the times from `from` to `to`, in microseconds.
(() => {
  const figure = document.querySelector("figure.timeline");
  const {kinds, texts, ranks} = JSON.parse(figure.querySelector("script").textContent);
  const canvas = figure.querySelector("canvas"), info = figure.querySelector(".span-info");
  const pen = canvas.getContext("2d");
  const LANE = 44, BAR = 20, CALL = 5, AXIS = 22;
  for (const rank of ranks) {  // lengths to times
    let now = rank.start;
    rank.segments = rank.segments.map(([length, kind, text, call]) => ({start: now, end: now += length, kind, text, call}));
    rank.calls = rank.calls.map(([start, length, exposed, hidden, text, payload, sent, late]) => ({start, end: start + length, exposed, hidden, text, payload, sent, late}));
  }
  const first = Math.min(...ranks.map(rank => rank.start));
  const last = Math.max(...ranks.map(rank => rank.segments.at(-1).end));
  let from = first, to = last, chosen = 0, span = -1, colors = [], quiet, rule, ink, accent;

  const color = name => {
    const probe = document.createElement("i");
    probe.className = name;
    figure.append(probe);
    const found = getComputedStyle(probe).color;
    probe.remove();
    return found;
  };
  const readColors = () => {
    colors = kinds.map(kind => color(`k-${kind}`));
    [quiet, rule, ink, accent] = ["c-quiet", "c-rule", "c-ink", "c-accent"].map(color);
  };
  const time = us => us >= 1e5 ? `${(us / 1e3).toFixed(0)} ms` : us >= 1e3 ? `${(us / 1e3).toFixed(2)} ms` : `${us.toFixed(0)} µs`;
  const bytes = n => n >= 1e6 ? `${(n / 1e6).toFixed(2)} MB` : n >= 1e3 ? `${(n / 1e3).toFixed(1)} kB` : `${n} B`;
  const x = us => (us - from) / (to - from) * canvas.clientWidth;

  const draw = () => {
    const wide = canvas.clientWidth, high = ranks.length * LANE + AXIS, ratio = devicePixelRatio || 1;
    figure.dataset.view = `${from} ${to}`;
    canvas.style.height = `${high}px`;
    canvas.width = wide * ratio;
    canvas.height = high * ratio;
    pen.scale(ratio, ratio);
    pen.font = "11px system-ui, sans-serif";
    axis(wide, high);
    ranks.forEach((rank, i) => {
      const top = i * LANE + 6;
      for (const segment of rank.segments) {
        if (segment.end < from || segment.start > to) continue;
        const left = x(segment.start), right = x(segment.end);
        pen.fillStyle = colors[segment.kind];
        pen.fillRect(left, top, Math.max(right - left - (right - left > 3 ? .5 : 0), .4), BAR);
        if (right - left > 46) label(texts[segment.text] || kinds[segment.kind], left, right, top + 14);
      }
      pen.fillStyle = accent;
      let free = [];  // until when each of the thin rows is taken
      for (const call of rank.calls) {
        const row = free.findIndex(end => end <= call.start), at = row < 0 ? free.length : row;
        free[at] = call.end;
        if (call.end < from || call.start > to || at > 1) continue;
        pen.fillRect(x(call.start), top + BAR + 3 + at * (CALL + 1), Math.max(x(call.end) - x(call.start) - .5, 1), CALL);
      }
      if (i === chosen && span >= 0) {
        const {start, end} = rank.segments[span];
        pen.strokeStyle = ink;
        pen.lineWidth = 2;
        pen.strokeRect(x(start) - 1, top - 2, Math.max(x(end) - x(start) + 2, 3), BAR + 4);
      }
    });
  };
  const label = (text, left, right, y) => {
    const [a, b] = [Math.max(left, 0), Math.min(right, canvas.clientWidth)];
    if (b - a < 46) return;
    pen.save();
    pen.beginPath();
    pen.rect(a, y - 14, b - a - 4, 20);
    pen.clip();
    pen.fillStyle = "#fff";
    pen.shadowColor = "#000a";
    pen.shadowBlur = 2;
    pen.fillText(text, a + 4, y);
    pen.restore();
  };
  const axis = (wide, high) => {
    const rough = (to - from) / Math.max(wide / 110, 2), power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map(n => n * power).find(n => n >= rough);
    pen.fillStyle = quiet;
    pen.strokeStyle = rule;
    pen.lineWidth = 1;
    for (let at = Math.ceil((from - first) / step) * step; at <= to - first; at += step) {
      const left = x(at + first);
      pen.beginPath();
      pen.moveTo(left, 0);
      pen.lineTo(left, high - AXIS + 4);
      pen.stroke();
      const text = time(at);
      pen.fillText(text, Math.min(left + 3, wide - pen.measureText(text).width), high - 6);
    }
    for (const [step, start] of ranks[0].steps) {
      const left = x(start);
      if (left < 0 || left > wide) continue;
      pen.strokeStyle = quiet;
      pen.beginPath();
      pen.moveTo(left, 0);
      pen.lineTo(left, high - AXIS + 4);
      pen.stroke();
    }
  };

  const view = (a, b) => {
    const length = Math.min(Math.max(b - a, 20), last - first);
    from = Math.max(first, Math.min(a, last - length));
    to = from + length;
    draw();
  };
  const zoom = (factor, at = (from + to) / 2) => view(at - (at - from) * factor, at + (to - at) * factor);
  const move = share => view(from + share * (to - from), to + share * (to - from));
  const choose = (rank, index) => {
    chosen = Math.max(0, Math.min(ranks.length - 1, rank));
    const {segments, calls, rank: number} = ranks[chosen];
    span = Math.max(0, Math.min(segments.length - 1, index));
    const segment = segments[span], call = calls[segment.call];
    let text = `rank ${number}, ${kinds[segment.kind]}${texts[segment.text] ? `, ${texts[segment.text]}` : ""}: ${time(segment.end - segment.start)}`;
    if (call) {
      text += `; for ${texts[call.text]}: payload ${bytes(call.payload)}, sent ${bytes(call.sent)}, ${time(call.exposed)} exposed, ${time(call.hidden)} hidden`;
      if (call.late >= 0) text += `; rank ${call.late} started it last`;
    }
    info.textContent = text;
    const middle = (segment.start + segment.end) / 2;
    if (segment.end < from || segment.start > to) view(middle - (to - from) / 2, middle + (to - from) / 2);
    else draw();
  };
  const nearest = (rank, at) => Math.max(0, ranks[rank].segments.findIndex(segment => segment.end > at));
  const next = by => choose(chosen, span < 0 ? nearest(chosen, from) : span + by);
  const other = by => {
    const rank = Math.max(0, Math.min(ranks.length - 1, chosen + (span < 0 ? 0 : by)));
    const at = span < 0 ? from : ranks[chosen].segments[span].start + 1;
    choose(rank, nearest(rank, at));
  };

  const actions = {
    in: () => zoom(.5), out: () => zoom(2), left: () => move(-.25), right: () => move(.25),
    whole: () => view(first, last), before: () => next(-1), after: () => next(1),
  };
  const keys = {
    "+": "in", "=": "in", "-": "out", ArrowLeft: "left", ArrowRight: "right", "0": "whole",
    ",": "before", ".": "after",
  };
  canvas.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "ArrowUp") other(-1);
    else if (event.key === "ArrowDown") other(1);
    else if (keys[event.key]) actions[keys[event.key]]();
    else return;
    event.preventDefault();
  });
  for (const button of figure.querySelectorAll("button")) {
    button.addEventListener("click", () => {
      if (button.dataset.do) actions[button.dataset.do]();
      else {
        const spans = ranks.flatMap(rank => rank.steps.filter(([step]) => step === Number(button.dataset.step)));
        view(Math.min(...spans.map(one => one[1])), Math.max(...spans.map(one => one[2])));
      }
    });
  }
  const timeAt = event => from + (event.clientX - canvas.getBoundingClientRect().left) / canvas.clientWidth * (to - from);
  canvas.addEventListener("wheel", event => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    zoom(event.deltaY > 0 ? 1.25 : .8, timeAt(event));
  }, {passive: false});
  let grabbed = null;
  canvas.addEventListener("pointerdown", event => {
    grabbed = {x: event.clientX, from, to, moved: false};
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", event => {
    if (!grabbed) return;
    const by = (grabbed.x - event.clientX) / canvas.clientWidth * (grabbed.to - grabbed.from);
    grabbed.moved ||= Math.abs(event.clientX - grabbed.x) > 3;
    if (grabbed.moved) view(grabbed.from + by, grabbed.to + by);
  });
  canvas.addEventListener("pointerup", event => {
    if (grabbed && !grabbed.moved) {
      const rank = Math.floor((event.clientY - canvas.getBoundingClientRect().top) / LANE);
      if (rank < ranks.length) choose(rank, nearest(rank, timeAt(event)));
    }
    grabbed = null;
  });
  addEventListener("theme", () => { readColors(); draw(); });
  new ResizeObserver(draw).observe(canvas.parentNode);
  readColors();
  draw();
})();
