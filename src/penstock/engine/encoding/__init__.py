"""Pictures on their way to features: what is encoded when, what is kept for how long. Nothing here sees a tensor."""

from penstock.engine.encoding.cursor import PictureCursor
from penstock.engine.encoding.desk import EncodingDesk
from penstock.engine.encoding.features import FeatureCache
from penstock.engine.encoding.planner import EncodePlanner

__all__ = ["EncodePlanner", "EncodingDesk", "FeatureCache", "PictureCursor"]
