"""What does a teacher save a mixture-of-experts student, its own cost counted?"""
