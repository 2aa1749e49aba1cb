// From a picture's file to the model's input, by the steps of predict.py and to the same bytes:
// the result of a browser's own scaling depends on the browser, and the model learned from Pillow's.
"use strict";

// A kernel's value at a distance from its centre, and the distance from which on it is 0.
const KERNELS = {
  bilinear: { reach: 1, at: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: { reach: 2, at: keysCubic }
};

const PRECISION = 22; // bits after the point of a weight
const MOST_PIXELS = 178956970; // of an image, and the longer side by the shorter: those of predict.py
const MOST_ELONGATION = 1000;
const HEADER_BYTES = 1 << 20; // which hold the size of an image, behind a JPEG's EXIF data and profiles too
const STRIP_PIXELS = 1 << 22; // read at once: a canvas of a whole photo is more than some phones allow

/** Keys' cubic convolution with a = -1/2, in the order of operations that Pillow rounds by. */
function keysCubic(signed) {
  const a = -0.5;
  const x = Math.abs(signed);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

/** Python's round(): halves go to the even neighbour. */
function roundHalfEven(value) {
  const below = Math.floor(value);
  if (value - below !== 0.5) return Math.round(value);
  return below % 2 === 0 ? below : below + 1;
}

/**
 * How a line of `from` pixels is scaled to `to`, of which the middle `size` are kept.
 *
 * Kept pixel i is the sum of weights[i * stride + j] times source pixel firsts[i] + j, for j < lengths[i].
 * Of the source, pixels `start` to `end` are used: for what the crop cuts off nothing is computed.
 */
function axisOf(from, to, size, kernel) {
  const offset = roundHalfEven((to - size) / 2);
  const scale = from / to;
  const stretch = Math.max(scale, 1); // a smaller picture takes a wider kernel, against aliasing
  const reach = kernel.reach * stretch;
  const stride = 2 * Math.ceil(reach) + 1;
  const firsts = new Int32Array(size);
  const lengths = new Int32Array(size);
  const weights = new Int32Array(size * stride);
  for (let i = 0; i < size; i++) {
    const centre = (offset + i + 0.5) * scale;
    firsts[i] = Math.max(0, Math.trunc(centre - reach + 0.5));
    lengths[i] = Math.min(from, Math.trunc(centre + reach + 0.5)) - firsts[i];
    const shares = new Float64Array(lengths[i]);
    let sum = 0;
    for (let j = 0; j < shares.length; j++) {
      shares[j] = kernel.at((j + firsts[i] - centre + 0.5) * (1 / stretch));
      sum += shares[j];
    }
    for (let j = 0; j < shares.length; j++) {
      const share = (sum === 0 ? shares[j] : shares[j] / sum) * (1 << PRECISION);
      weights[i * stride + j] = Math.trunc(share + (share < 0 ? -0.5 : 0.5));
    }
  }
  const start = firsts[0];
  const end = firsts[size - 1] + lengths[size - 1];
  return { size, stride, firsts, lengths, weights, start, end };
}

/** How a picture of `width` x `height` becomes the model's square: its axes, and which is scaled first. */
function planFor(width, height, { size, interpolation, resize_mode: mode }) {
  let [toWidth, toHeight] = [size, size];
  if (mode !== "squash" && width <= height) toHeight = Math.trunc((size * height) / width);
  else if (mode !== "squash") toWidth = Math.trunc((size * width) / height);
  return {
    x: axisOf(width, toWidth, size, KERNELS[interpolation]),
    y: axisOf(height, toHeight, size, KERNELS[interpolation]),
    // Pillow's choice since version 13; before, never. As each pass rounds to bytes, the order shows.
    yFirst: height > toHeight && height - toHeight > 2 * (width - toWidth)
  };
}

/**
 * Scale `count` lines of pixels along an axis.
 *
 * source and target: { bytes, offset, line, pixel }: where the first line begins, and how many bytes
 * lie between lines and between a line's pixels. The source's lines begin with the axis's pixel `start`.
 */
function scaleLines(source, axis, count, target) {
  const { size, stride, firsts, lengths, weights, start } = axis;
  const { bytes, pixel } = source;
  for (let y = 0; y < count; y++) {
    for (let i = 0; i < size; i++) {
      let red = 1 << (PRECISION - 1);
      let green = red;
      let blue = red;
      let at = source.offset + y * source.line + (firsts[i] - start) * pixel;
      for (let j = i * stride, end = j + lengths[i]; j < end; j++, at += pixel) {
        red += bytes[at] * weights[j];
        green += bytes[at + 1] * weights[j];
        blue += bytes[at + 2] * weights[j];
      }
      const to = target.offset + y * target.line + i * target.pixel;
      target.bytes[to] = clipped(red);
      target.bytes[to + 1] = clipped(green);
      target.bytes[to + 2] = clipped(blue);
    }
  }
}

function clipped(sum) {
  return Math.min(255, Math.max(0, sum >> PRECISION));
}

/** Throw for an image that predict.py does not decode either: of too many pixels, or much longer than wide. */
function checkSize(width, height) {
  const size = `${width} x ${height} pixels`;
  if (width * height > MOST_PIXELS) {
    throw new RangeError(`${size}: the image size exceeds the limit of ${MOST_PIXELS.toLocaleString("en")} pixels; make it smaller`);
  }
  if (Math.max(width, height) > MOST_ELONGATION * Math.min(width, height)) {
    throw new RangeError(`${size}: one side is more than ${MOST_ELONGATION.toLocaleString("en")} times the other; crop the image`);
  }
}

/** The width and height that the header of a PNG, JPEG, GIF or BMP file states; null for any other file. */
async function statedSize(file) {
  const view = new DataView(await file.slice(0, HEADER_BYTES).arrayBuffer());
  const starts = (...bytes) => view.byteLength >= 26 && bytes.every((byte, at) => view.getUint8(at) === byte);
  if (starts(0x89, 0x50, 0x4e, 0x47)) return [view.getUint32(16), view.getUint32(20)];
  if (starts(0x47, 0x49, 0x46)) return [view.getUint16(6, true), view.getUint16(8, true)];
  if (starts(0x42, 0x4d)) return [view.getInt32(18, true), Math.abs(view.getInt32(22, true))];
  if (!starts(0xff, 0xd8)) return null;
  // A JPEG is a row of segments: a marker, then their length. The frame's has the size.
  for (let at = 2; at + 9 <= view.byteLength && view.getUint8(at) === 0xff; at += 2 + view.getUint16(at + 2)) {
    const marker = view.getUint8(at + 1);
    const isFrame = marker >= 0xc0 && marker <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(marker);
    if (isFrame) return [view.getUint16(at + 7), view.getUint16(at + 5)];
  }
  return null;
}

/** The image in a file, upright; rejects a file that the browser cannot decode. */
function decode(file) {
  return createImageBitmap(file, {
    imageOrientation: "from-image",
    colorSpaceConversion: "none",
    premultiplyAlpha: "none"
  });
}

/** Reads parts of an ImageBitmap composited on white: RGBA bytes, row by row. */
function readerOf(bitmap) {
  const canvas = document.createElement("canvas");
  const context = canvas.getContext("2d", { willReadFrequently: true });
  return (left, top, width, height) => {
    canvas.width = width;
    canvas.height = height;
    context.fillStyle = "white";
    context.fillRect(0, 0, width, height);
    context.drawImage(bitmap, left, top, width, height, 0, 0, width, height);
    const bytes = context.getImageData(0, 0, width, height).data;
    // A canvas beyond the browser's limits is empty, without an error; a painted one is opaque.
    if (bytes[3] !== 255) throw new Error(`${bitmap.width} x ${bitmap.height} pixels are too many for this browser`);
    return bytes;
  };
}

/** An ImageBitmap as the model's square, on white: RGB bytes, row by row. */
function squareOf(bitmap, preprocessing) {
  const { x, y, yFirst } = planFor(bitmap.width, bitmap.height, preprocessing);
  const { size } = preprocessing;
  const [along, across] = yFirst ? [y, x] : [x, y];
  const read = readerOf(bitmap);
  const length = along.end - along.start;
  const lines = across.end - across.start;
  const strip = Math.max(1, Math.trunc(STRIP_PIXELS / length));
  const scaled = new Uint8Array(lines * size * 3); // line by line, whichever way they run
  for (let done = 0; done < lines; done += strip) {
    const count = Math.min(strip, lines - done);
    const source = yFirst
      ? { bytes: read(x.start + done, y.start, count, length), offset: 0, line: 4, pixel: 4 * count }
      : { bytes: read(x.start, y.start + done, length, count), offset: 0, line: 4 * length, pixel: 4 };
    scaleLines(source, along, count, { bytes: scaled, offset: done * size * 3, line: size * 3, pixel: 3 });
  }
  const square = new Uint8Array(size * size * 3);
  const [line, pixel] = yFirst ? [size * 3, 3] : [3, size * 3];
  scaleLines({ bytes: scaled, offset: 0, line: 3, pixel: size * 3 }, across, size, {
    bytes: square,
    offset: 0,
    line,
    pixel
  });
  return square;
}

/** An ImageBitmap as the model's input: float32 (3, size, size), minus the mean, divided by the deviation. */
function prepare(bitmap, preprocessing) {
  checkSize(bitmap.width, bitmap.height);
  const { size, mean, std } = preprocessing;
  const square = squareOf(bitmap, preprocessing);
  const input = new Float32Array(3 * size * size);
  for (let channel = 0; channel < 3; channel++) {
    // Rounded to float32 after each operation, as numpy does.
    const values = Float32Array.from(
      { length: 256 },
      (_, byte) => Math.fround(Math.fround(byte / 255) - Math.fround(mean[channel])) / Math.fround(std[channel])
    );
    for (let i = 0; i < size * size; i++) input[channel * size * size + i] = values[square[3 * i + channel]];
  }
  return input;
}
