"""The study: where does an ensemble of seeds beat what costs the same?"""
