from paceline.rl.integrations.trl import paceline_rollouts as paceline_rollouts
from paceline.rl.recipe import load_config as load_config
from paceline.rl.rewards.registry import LengthAware as LengthAware
from paceline.rollout import Request as Request
from paceline.rollout import RolloutEngine as RolloutEngine
from paceline.rollout import SamplingParams as SamplingParams

load_recipe = load_config
__version__: str
