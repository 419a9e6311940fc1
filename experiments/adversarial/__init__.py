"""Does adversarial learning improve on distillation, on data selection, on the teacher?"""
