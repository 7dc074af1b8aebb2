package policy

// positions finds where a path of the document stood.
type positions struct{}

func (d *Document) pos(string) Pos { return Pos{} }
