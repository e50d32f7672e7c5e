package main

// The command import.

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

type importCmd struct {
	File      string `arg:"" help:"The contracts, as export writes them; - is standard input."`
	KeepGoing bool   `env:"-" help:"Import the good lines also when there are bad ones, and exit 1 then."`
	database
}

// Run reports each bad line, and stores the contracts of all lines or of none; with
// --keep-going, of all good lines.
func (c *importCmd) Run(ctx context.Context, a *app) (err error) {
	file, size, err := a.input(c.File)
	if err != nil {
		return err
	}
	defer file.Close()
	control, err := a.control(c.DB, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, control.close()) }()
	query := url.Values{"keep_going": {strconv.FormatBool(c.KeepGoing)}}
	content, _, err := control.send(ctx, http.MethodPost, "/contracts?"+query.Encode(), reading(ctx, file))
	if err != nil {
		return err
	}
	defer content.Close()
	events := jsontext.NewDecoder(content)
	bar := a.progress("reading", size, "")
	defer func() { bar.done() }()
	storing := false
	for {
		var e importEvent
		if err := json.UnmarshalDecode(events, &e); err != nil {
			return fmt.Errorf("read what became of the import: %w", explainTruncation(err))
		}
		for _, f := range e.Faults {
			bar.interrupt()
			fmt.Fprintf(a.stdout, "line %d: %s\n", e.Line, f)
		}
		if e.Of > 0 && !storing {
			storing = true
			bar.done()
			bar = a.progress("storing", e.Of, "contracts")
		}
		bar.add(e.Read + e.Stored)
		switch {
		case e.Problem != "":
			return errors.New(e.Problem)
		case e.End == nil:
		case e.End.Bad > 0 && !c.KeepGoing:
			return fmt.Errorf("%d of %s bad: nothing was imported; mend what is bad, or import the rest with --keep-going", e.End.Bad, counted(e.End.Lines, "line"))
		default:
			bar.done()
			fmt.Fprintf(a.stdout, "imported %s\n", counted(e.End.Imported, "contract"))
			if e.End.Bad > 0 {
				return fmt.Errorf("%d of %s bad: not imported", e.End.Bad, counted(e.End.Lines, "line"))
			}
			return nil
		}
	}
}
