"""What a ViT looks at and what it has learned: tensors here, pictures in `vitlit.inspection.figures`."""

from vitlit.inspection.attention import attended, attention, attention_distance, attentions, rollout
from vitlit.inspection.patches import filter_components, occlusion, patch_components, position_similarity

__all__ = ["attended", "attention", "attention_distance", "attentions", "filter_components", "occlusion"]
__all__ += ["patch_components", "position_similarity", "rollout"]
