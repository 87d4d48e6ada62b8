"""The word renderer: images of words with exact masks, endless and reproducible from a seed."""

from rendering.config import RenderConfig, load_render_config
from rendering.endless import RenderedWords
from rendering.engine import RenderedWord, WordRenderer
from rendering.streams import Stream

__all__ = ["RenderConfig", "RenderedWord", "RenderedWords", "Stream", "WordRenderer", "load_render_config"]
