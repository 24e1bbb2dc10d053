"""Steps that several merge rules are composed of."""
