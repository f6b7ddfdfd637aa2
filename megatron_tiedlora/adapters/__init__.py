"""The paper's methods as data, and the tied adapter built from them."""
