// Render DiceBear avatars as PNG on white, with all their attributes: `node render.mjs STYLE COUNT OUTPUT_DIR [FIRST] [palette]`.
// Setup: npm install @dicebear/core@9 @dicebear/collection@9 @resvg/resvg-js
// Writes STYLE_00000.png ... and adds a line for each to OUTPUT_DIR/attributes.jsonl. FIRST is the number of the first
// avatar: what is drawn depends on the style and the number alone. With `palette`, hair, skin and clothes take colours
// from the lists below in place of the style's own, so that a colour word means the same in every style.
import { createAvatar } from '@dicebear/core';
import * as collection from '@dicebear/collection';
import { Resvg } from '@resvg/resvg-js';
import fs from 'fs';

const SIZE = 64;
const PAINT = [
  '202020', '3a3a3a', 'f2f2f2', 'dedede', '7d7d7d', '9a9a9a', 'd9323e', 'c2474f', 'ea8334', 'f29c65', 'f5d250', 'f3c83a',
  '3ca050', '6dbb58', '45b8b0', '54d7c7', '3c6edc', '5278ff', '96c8f5', '7fb4ea', '8250c8', '7555ca', 'f582aa', 'e16381',
  '6e4128', '80533a', 'e1be78', 'd6b06a', '1e1e64', '2d2b58',
];
const SKIN = ['4a2f27', '623d36', '704a38', '7d4c3c', 'a0674f', 'b16a5b', 'b9785a', 'c68863', 'd78774', 'e5a07e', 'eeb4a4', 'f2c4a8', 'f8d3bd', 'ffdbc4'];
const PALETTES = {
  hairColor: PAINT, headContrastColor: PAINT, topColor: PAINT, clothingColor: PAINT, clothesColor: PAINT, shirtColor: PAINT,
  bodyColor: PAINT, skinColor: SKIN,
};

const [, , style, count, output, first = '0', palette] = process.argv;
const design = collection[style];
const options = { backgroundColor: ['ffffff'] };
if (palette) {
  for (const key of Object.keys(design.schema.properties)) if (PALETTES[key]) options[key] = PALETTES[key];
  if (style === 'micah') options.baseColor = SKIN;
}
fs.mkdirSync(output, { recursive: true });
const lines = [];
for (let i = Number(first); i < Number(first) + Number(count); i++) {
  const avatar = createAvatar(design, { ...options, seed: `${style}-${i}` });
  const file = `${style}_${String(i).padStart(5, '0')}.png`;
  const image = new Resvg(avatar.toString(), { background: '#ffffff', fitTo: { mode: 'width', value: SIZE } });
  fs.writeFileSync(`${output}/${file}`, image.render().asPng());
  lines.push(JSON.stringify({ file_name: file, style, attributes: avatar.toJson().extra }));
}
fs.appendFileSync(`${output}/attributes.jsonl`, lines.join('\n') + '\n');
