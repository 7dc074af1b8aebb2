package main

import (
	"sallyport/internal/admin"
	"sallyport/internal/dashboard"
)

// withPages adds the dashboard to what the admin server answers, if it listens.
func withPages(c admin.Config) admin.Config {
	if c.Listen == "" {
		return c
	}
	c.Pages = dashboard.New(dashboard.Config{Status: c.Status, API: c.API})
	return c
}
