"""Strategies of Lightning: what a rank holds, how gradients are clipped, how processes end together."""
