// Browser uses the docs page in headless Chromium as a person would: it authorizes as a client,
// runs the example of the vendor's page and reads the response. It prints a report as JSON and
// saves screenshots.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/chromedp"
)

// report describes the requests of the page and the content that a person sees.
type report struct {
	Page     string         `json:"page"`     // the URL to which "/" redirects
	Console  []string       `json:"console"`  // each message of the page or of the browser
	Hosts    map[string]int `json:"hosts"`    // requests, by scheme and host
	Failed   []string       `json:"failed"`   // errors of requests without a response
	Status   string         `json:"status"`   // of the response to the PUT
	Content  string         `json:"content"`  // of that response, as shown
	Overflow map[string]int `json:"overflow"` // pixels by which the page is wider than the window, by screenshot
}

// stepTimeout is the limit for one action of the user, including its effect on the page.
const stepTimeout = 20 * time.Second

// lastMessage is written to the console at the end of the visit.
const lastMessage = "the end of the visit"

func main() {
	at := flag.String("url", "", "the service, with the demo data")
	shots := flag.String("shots", ".", "the directory for the screenshots")
	flag.Parse()
	r, err := visit(*at, *shots)
	if err != nil {
		log.Fatal(err)
	}
	if err := json.NewEncoder(os.Stdout).Encode(r); err != nil {
		log.Fatal(err)
	}
}

// visit does all steps on the service at a URL, and saves the screenshots in the directory shots.
func visit(at, shots string) (*report, error) {
	ctx, cancel := chromedp.NewExecAllocator(context.Background(), append(chromedp.DefaultExecAllocatorOptions[:],
		chromedp.ExecPath("chromium"),
		chromedp.NoSandbox, // Chromium has no sandbox for root
		chromedp.DisableGPU,
		chromedp.Flag("disable-quic", true),
		chromedp.Flag("disable-component-update", true),
		chromedp.Flag("hide-scrollbars", true),
		chromedp.Flag("window-size", "1280,1024"))...)
	defer cancel()
	ctx, cancel = chromedp.NewContext(ctx)
	defer cancel()

	r := &report{Console: []string{}, Hosts: map[string]int{}, Failed: []string{}, Overflow: map[string]int{}}
	var mu sync.Mutex // guards r.Hosts and r.Failed
	err := chromedp.Listen(ctx, func(ev any) {
		mu.Lock()
		defer mu.Unlock()
		switch ev := ev.(type) {
		case *network.EventRequestWillBeSent:
			u, err := url.Parse(ev.Request.URL)
			if err != nil {
				r.Failed = append(r.Failed, err.Error())
			} else if u.Scheme != "data" {
				r.Hosts[u.Scheme+"://"+u.Host]++
			}
		case *network.EventLoadingFailed:
			r.Failed = append(r.Failed, ev.ErrorText)
		}
	})
	if err != nil {
		return nil, err
	}
	console := chromedp.Console(ctx)

	// After the first error, all later steps are skipped.
	do := func(name string, step chromedp.Action[chromedp.Void]) { get(ctx, &err, name, step) }
	shot := func(name string) {
		png := get(ctx, &err, "take a picture of "+name, chromedp.CaptureScreenshot())
		r.Overflow[name] = get(ctx, &err, "measure "+name, chromedp.Evaluate[int](
			`document.documentElement.scrollWidth - document.documentElement.clientWidth`))
		if err == nil {
			err = os.WriteFile(filepath.Join(shots, name+".png"), png, 0o644)
		}
	}
	const put = "#operations-Energy_contracts-updateEnergyContract"

	do("open /", chromedp.Navigate(at+"/"))
	do("see the operations", chromedp.WaitVisible(css(put)))
	r.Page = get(ctx, &err, "see where that is", chromedp.Location())
	shot("desktop")

	do("press Authorize", chromedp.Click(css(".auth-wrapper .authorize")))
	do("fill in the client's id", chromedp.SendKeys(css("#client_id_clientCredentials"), "demo"))
	do("fill in its secret", chromedp.SendKeys(css("#client_secret_clientCredentials"), "demo-secret"))
	do("choose the scope write", chromedp.Click(css("label[for^=write-clientCredentials]")))
	shot("authorize")
	do("press Authorize in the dialog", chromedp.Click(css(".modal-ux-content .auth-container .authorize")))
	do("be authorized", chromedp.WaitVisible("//button[text()='Logout']"))
	do("close the dialog", chromedp.Click(css(".btn-done")))

	do("open the PUT", chromedp.Click(css(put+" .opblock-summary-control")))
	do("choose the example", chromedp.SendKeys(css(put+" .opblock-section-request-body .examples-select-element"), "The example of the vendor"))
	do("press Execute", chromedp.Click(css(put+" .execute")))
	r.Status = get(ctx, &err, "read the status", chromedp.Text(css(put+" .live-responses-table tbody .response-col_status")))
	r.Content = get(ctx, &err, "read the response", chromedp.Text(css(put+" .live-responses-table tbody pre")))
	do("scroll to the answer", chromedp.ScrollIntoView(css(put+" .live-responses-table")))
	shot("desktop-answer")
	do("switch to the size of a phone", chromedp.EmulateViewport(390, 844, chromedp.EmulateMobile))
	do("scroll to the answer", chromedp.ScrollIntoView(css(put+" .live-responses-table")))
	shot("phone-answer")
	do("open / on the phone", chromedp.Navigate(at+"/"))
	do("see the operations on the phone", chromedp.WaitVisible(css(put)))
	shot("phone")

	do("write the last message", chromedp.Evaluate[chromedp.Void](`console.log("`+lastMessage+`")`))
	if err != nil {
		return nil, err
	}
	for message, err := range console {
		if err != nil {
			return nil, err
		}
		if message.Text == lastMessage {
			break
		}
		r.Console = append(r.Console, message.String())
	}
	mu.Lock()
	defer mu.Unlock()
	return r, nil
}

type css = chromedp.CSS

// get runs a step and returns its value, unless *err is set by an earlier step. If the step
// fails, get sets *err.
func get[T any](ctx context.Context, err *error, name string, step chromedp.Action[T]) (value T) {
	if *err != nil {
		return value
	}
	ctx, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	value, failed := chromedp.Run(ctx, step)
	if failed != nil {
		*err = fmt.Errorf("%s: %w", name, failed)
	}
	return value
}
