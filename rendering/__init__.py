"""The word renderer: images of words with exact masks, endless and reproducible from a seed."""

from rendering.config import RenderConfig, load_render_config
from rendering.engine import RenderedWord, Stream, WordRenderer

__all__ = ["RenderConfig", "RenderedWord", "Stream", "WordRenderer", "load_render_config"]
