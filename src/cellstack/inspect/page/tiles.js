// The pixels of a map: units by steps as colours, drawn from the pyramid of minima and maxima; only the visible part.

const BROKEN = [0xff000000, 0xffffffff]; // striped: NaN; chequered: infinite

// The blocks of the pyramid, or the step, under each column of pixels.
function columnsOf(plane, wide, first, perPixel) {
  const level = plane.level(perPixel);
  const single = perPixel <= 1;
  const end = Math.max(0, Math.min(wide, Math.ceil((plane.steps - first) / perPixel)));
  const [lowData, highData, size, count] = level === null ? [plane.data, plane.data, 1, plane.steps] : [level.low, level.high, level.block, level.count];
  const starts = new Int32Array(end);
  const stops = new Int32Array(end);
  for (let x = 0; x < end; x += 1) {
    const from = first + x * perPixel;
    starts[x] = Math.min(count - 1, Math.floor((single ? from + perPixel / 2 : from) / size));
    stops[x] = single ? starts[x] : Math.max(starts[x], Math.min(count - 1, Math.ceil((from + perPixel) / size) - 1));
  }
  return { end, starts, stops, single, lowData, highData, count, lows: new Float32Array(end), highs: new Float32Array(end) };
}

// The smallest and the largest number under each column, for the units in rows `row` to `lastRow`.
function gather({ end, starts, stops, lowData, highData, count, lows, highs }, positions, row, lastRow) {
  for (let one = row; one <= lastRow; one += 1) {
    const base = positions[one] * count;
    for (let x = 0; x < end; x += 1) {
      const stop = base + stops[x];
      let n = base + starts[x];
      let least = one === row ? lowData[n] : lows[x];
      let most = one === row ? highData[n] : highs[x];
      for (n += one === row ? 1 : 0; n <= stop; n += 1) {
        const a = lowData[n];
        const b = highData[n];
        if (!(a >= least)) least = least !== least ? least : a;
        if (!(b <= most)) most = most !== most ? most : b;
      }
      lows[x] = least;
      highs[x] = most;
    }
  }
}

// Paint `pixels`, wide × height.
//
//   plane, positions   the numbers, and the unit of each row
//   first, perPixel    the step at the left edge, and the number of steps per pixel
//   rowHeight, offset  height of a unit in pixels, and pixels scrolled away above
//   scale, colours     the mapping from numbers to the 256 colours
//   apart              whether to leave gaps between steps and between units
export function paintTiles(pixels, wide, height, { plane, positions, first, perPixel, rowHeight, offset, scale, colours, apart }) {
  const times = 255 / (scale.high - scale.low || 1);
  const columns = columnsOf(plane, wide, first, perPixel);
  const half = (scale.low + scale.high) / 2;
  const last = Math.min(height, Math.ceil(plane.units * rowHeight - offset));
  const { end, starts, single, lows, highs } = columns;
  for (let y = 0; y < last; ) {
    // One unit per row of pixels, or all units that fall into it.
    let row = Math.floor((y + offset + 1e-6) / rowHeight);
    let lastRow = row;
    let until = y + 1;
    if (rowHeight >= 1) until = Math.min(last, Math.max(until, Math.ceil((row + 1) * rowHeight - offset - 1e-6)));
    else {
      row = Math.ceil((y + offset) / rowHeight - 1e-6);
      lastRow = Math.max(row, Math.ceil((y + 1 + offset) / rowHeight - 1e-6) - 1);
    }
    row = Math.min(row, plane.units - 1);
    lastRow = Math.min(lastRow, plane.units - 1);
    gather(columns, positions, row, lastRow);
    const middle = until - y > 1 && !single ? (y + until) / 2 : until;
    for (let line = y; line < until; line += 1) {
      if (line > y && (line < middle || line - 1 >= middle) && !plane.range.broken) {
        pixels.copyWithin(line * wide, (line - 1) * wide, (line - 1) * wide + end); // same as the line above
        continue;
      }
      const base = line * wide;
      // The upper half of a row shows the largest number under a pixel, the lower half the smallest; a row of one pixel
      // shows the one further from the middle of the scale.
      for (let x = 0; x < end; x += 1) {
        let value = line < middle ? highs[x] : lows[x];
        if (middle === until && lows[x] !== highs[x]) value = half - lows[x] > highs[x] - half ? lows[x] : highs[x];
        const broken = value - value !== 0;
        if (broken) {
          pixels[base + x] = value === Infinity || value === -Infinity ? BROKEN[((x >> 2) + (line >> 2)) & 1] : BROKEN[((x + line) >> 2) & 1];
        } else {
          let place = (value - scale.low) * times;
          place = place < 0 ? 0 : place > 255 ? 255 : place;
          pixels[base + x] = colours[place | 0];
        }
      }
    }
    if (apart) {
      pixels.fill(0, (until - 1) * wide, until * wide);
      for (let x = 1; x < end; x += 1) {
        if (starts[x] !== starts[x - 1]) {
          for (let line = y; line < until; line += 1) pixels[line * wide + x - 1] = 0;
        }
      }
    }
    y = until;
  }
}
