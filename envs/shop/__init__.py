"""The shop: multi-turn word problems with a hidden price; the environment of the quick start."""

from envs.shop.environment import ShopEnvironment

__all__ = ["ShopEnvironment"]
