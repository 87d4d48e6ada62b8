"""Read images of words with the files that tools/export_onnx.py writes: an example without torch, to copy.

    python tools/read_with_onnx.py binet.onnx ssn.onnx fig/demo/*.png

Predictions are those of `Reader(precision="fp32", tta_below=0)`, for opaque images that are not tall and networks that
read with masks.
"""

import argparse
import json

import cv2
import numpy as np
import onnxruntime


def main(arguments: list[str] | None = None) -> None:
    """Print path, prediction and confidence of each image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recogniser", help="ONNX file")
    parser.add_argument("ssn", help="ONNX file")
    parser.add_argument("images", nargs="+")
    options = parser.parse_args(arguments)
    recogniser, ssn = map(onnxruntime.InferenceSession, (options.recogniser, options.ssn))
    facts = recogniser.get_modelmeta().custom_metadata_map
    height, width = json.loads(facts["image_size"])
    mean, std = (np.array(json.loads(facts[name]), np.float32).reshape(3, 1, 1) for name in ("mean", "std"))
    if facts["fit"] == "centre":
        parser.error("this example knows the fits stretch and left")
    for path in options.images:
        image = cv2.imread(path)
        if image is None:
            parser.error(f"{path} is missing or no image")
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)  # (H, W, 3) uint8
        pixels = image.transpose(2, 0, 1)[None].astype(np.float32)  # (1, 3, H, W), 0 to 255
        probability = ssn.run(["text_probability"], {"image": pixels})[0][0, 0]  # (H, W)
        mask = np.rint(255 * probability).astype(np.uint8)
        scale = min(height / image.shape[0], width / image.shape[1])
        size = [max(round(side * scale), 1) for side in image.shape[:2]] if facts["fit"] == "left" else (height, width)
        word = np.zeros((height, width, 4), np.uint8)  # RGB and mask
        word[: size[0], : size[1]] = cv2.resize(np.dstack((image, mask)), size[::-1], interpolation=cv2.INTER_LINEAR)
        word = word.astype(np.float32).transpose(2, 0, 1)[None] / 255  # (1, 4, 32, 128)
        inputs = {"image": (word[:, :3] - mean) / std, "mask": word[:, 3:]}
        logits = recogniser.run(["logits"], inputs)[0][0]  # (steps, classes)
        classes = logits.argmax(1)
        end = int((classes == 0).argmax()) if 0 in classes else len(classes)
        text = "".join(facts["charset"][each - 1] for each in classes[:end])
        exponentials = np.exp(logits - logits.max(1, keepdims=True))
        confidence = (exponentials.max(1) / exponentials.sum(1))[: end + 1].prod()
        print(f"{path}\t{text}\t{confidence:.4f}")


if __name__ == "__main__":
    main()
