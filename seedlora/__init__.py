"""SeedLoRA: LoRA replicas of one task, trained as one stack, fused into one adapter."""
