"""
    python benchmarks/vision.py

Forward and backward pass of a vision tower that packs its images into one sequence (Qwen2-VL and its descendants):
attention to all images of a size at once against transformers' loop over images, on images of one size, of several
sizes, and with attention in windows.
"""

import copy
from itertools import cycle, islice

import torch
from timing import compare, make_parser, report
from transformers import AutoModelForImageTextToText

from mm_prm.embedded import model_path
from mm_prm.models import batch_vision_attention

# Heights and widths in pixels
CASES = {"one size": [(112, 112)], "four sizes": [(112, 112), (56, 168), (168, 112), (224, 224)]}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="mini-policy", help="embedded model, folder or Hub repository")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--num_images", type=int, default=64)
    parser.add_argument("--forward_only", action="store_true", help="without the backward pass")
    args = parser.parse_args()
    model = AutoModelForImageTextToText.from_pretrained(model_path(args.model), dtype=args.dtype)
    stock = model.model.visual.to(args.device)
    batched = batch_vision_attention(copy.deepcopy(stock))
    config = stock.config
    everywhere = list(range(config.depth))

    tables = []
    for case, windows in (("one size", False), ("four sizes", False), ("one size", True)):
        sizes = islice(cycle(CASES[case]), args.num_images)
        grid_thw = torch.tensor(
            [[1, height // config.patch_size, width // config.patch_size] for height, width in sizes]
        )
        shape = (int(grid_thw.prod(-1).sum()), config.in_channels * config.temporal_patch_size * config.patch_size**2)
        pixels = torch.rand(shape, dtype=stock.dtype).to(args.device)
        grid_thw = grid_thw.to(args.device)

        def step(tower, pixels=pixels, grid_thw=grid_thw):
            with torch.set_grad_enabled(not args.forward_only):
                output = tower(pixels, grid_thw=grid_thw).pooler_output
            if not args.forward_only:
                tower.zero_grad()
                output.square().mean().backward()
            return output

        for tower in (stock, batched):
            tower.fullatt_block_indexes = everywhere[-1:] if windows else everywhere
            tower.window_size = 4 * config.patch_size
        difference = (step(stock) - step(batched)).abs().max().item()
        heading = f"{case}, windows of 4 x 4 patches but in the last block" if windows else case
        variants = {"loop over images": lambda step=step: step(stock), "at once": lambda step=step: step(batched)}
        tables.append(compare(args, variants, args.num_images, "images", heading))
        tables[-1]["largest_difference"] = difference
        print(f"largest difference of the outputs: {difference:.1e}")
    report(args, tables)


if __name__ == "__main__":
    main()
