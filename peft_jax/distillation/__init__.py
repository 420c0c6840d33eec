"""Knowledge distillation: what a student learns from a teacher's predictions, hidden states and
texts.
"""
