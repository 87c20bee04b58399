// Numbers in texts, with their units.
function number(value, digits = 2) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size !== 0 && size < 0.001) return value.toExponential(1).replace(".0e", "e");
  return String(Number(value.toFixed(size < 0.1 ? Math.max(digits, 4) : digits)));
}

// A difference with its sign; `signed` in as few digits as it takes, `fixed` always with the same number of them.
function signed(value, digits = 3) {
  return `${value < 0 ? "−" : "+"}${number(Math.abs(value), digits)}`;
}

function fixed(value, digits = 2) {
  return `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(digits)}`;
}

function percent(value) {
  return `${Math.round(value * 100)} %`;
}

function grouped(count) {
  return count.toLocaleString("en");
}

function plural(count, word) {
  return `${grouped(count)} ${word}${count === 1 ? "" : "s"}`;
}

// As `mole.core.text` writes them: 84 kB, 270 MB, 16.4 GB; 0.31 s, 45 s, 12 min, 1.6 h.
function bytesText(size) {
  if (size >= 1e9) return `${(size / 1e9).toFixed(1)} GB`;
  return size >= 1e6 ? `${Math.round(size / 1e6)} MB` : `${Math.round(size / 1e3)} kB`;
}

function durationText(seconds) {
  if (seconds < 10) return `${seconds.toPrecision(2)} s`;
  if (seconds < 100) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

// A time that is counted up or down: 45 s, 12 min 5 s, 1 h 20 min.
function clockText(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
}
