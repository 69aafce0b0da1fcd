"""Rewards that run a network: CLIP, PickScore, HPSv2, ImageReward, the aesthetic predictor."""
