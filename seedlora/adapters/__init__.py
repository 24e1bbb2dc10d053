"""PEFT adapters: folders, the stack of replicas that a model runs, and what servers want of them."""
