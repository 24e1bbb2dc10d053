"""Tasks, generation and judgement: how adapters are scored by what they answer."""
