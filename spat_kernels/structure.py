class Structure:
    @classmethod
    def of(cls, model): return cls()
    def matches(self, model): return True
