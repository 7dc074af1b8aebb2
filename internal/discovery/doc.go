// Package discovery remembers what clients asked for: which group wanted which name,
// on which port, how often, and what became of it. From that it proposes policy
// ([Propose]) and reports on it ([Report]).
//
// A [Store] is told of every event and never in the way of traffic: it counts in
// bounded memory, and a goroutine of its own writes what has changed to a file.
package discovery
