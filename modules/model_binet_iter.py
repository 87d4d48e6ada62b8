"""The whole recogniser: vision, then rounds of language and alignment (ABINet, iterative correction; BINet).

Legend: N images, T steps, C classes, H x W pixels.
"""

from torch import Tensor, nn

from modules.model_alignment import AlignmentModel
from modules.model_language import LanguageModel
from modules.model_vision import VisionModel
from modules.names import leave_out_of_names
from modules.outputs import RecogniserOutput, text_lengths


class BINet(nn.Module):
    """BINet, or ABINet if its vision model has no mask branch. `iter_size` is the number of rounds."""

    def __init__(self, *, vision: VisionModel, language: LanguageModel, alignment: AlignmentModel, iter_size: int = 3):
        super().__init__()
        self.vision = vision
        self.language = language
        self.alignment = alignment
        self.iter_size = iter_size

    def forward(self, image: Tensor, mask: Tensor | None = None) -> RecogniserOutput:
        """image (N, 3, H, W), normalised; mask (N, 1, H, W) in [0, 1], 1 = text, not needed by ABINet.

        The first round corrects the vision model's prediction, each later one that of the round before.
        """
        vision = self.vision(image, mask)
        output = RecogniserOutput(vision=vision, language=[], alignment=[])
        logits = vision.logits  # (N, T, C)
        for _ in range(self.iter_size):
            language = self.language(logits.softmax(dim=-1), text_lengths(logits))
            alignment = self.alignment(language.feature, vision.feature)
            output.language.append(language)
            output.alignment.append(alignment)
            logits = alignment.logits
        return output


class VisionRecogniser(nn.Module):
    """Predicts with the vision model alone; parameters have the same names as in the vision model."""

    def __init__(self, vision: VisionModel):
        super().__init__()
        self.vision = vision
        leave_out_of_names(self, "vision")

    def forward(self, image: Tensor, mask: Tensor | None = None) -> RecogniserOutput:
        """Take the inputs of `VisionModel`."""
        return RecogniserOutput(vision=self.vision(image, mask))


class LanguageRecogniser(nn.Module):
    """Corrects spellings with the language model alone, in one round; names are those of the language model."""

    def __init__(self, language: LanguageModel):
        super().__init__()
        self.language = language
        leave_out_of_names(self, "language")

    def forward(self, probabilities: Tensor, lengths: Tensor) -> RecogniserOutput:
        """Take the inputs of `LanguageModel`."""
        return RecogniserOutput(language=[self.language(probabilities, lengths)])
