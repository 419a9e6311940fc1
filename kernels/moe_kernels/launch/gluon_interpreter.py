def interpret_gluon(*a): raise NotImplementedError
